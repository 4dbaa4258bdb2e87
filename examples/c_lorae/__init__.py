"""The evidence of docs/c_lorae.md on words; the multimodal experiment is examples/kaomoji."""
