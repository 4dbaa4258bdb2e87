"""The experiments of docs/c_lorae.md on words; the multimodal one is examples/kaomoji."""
