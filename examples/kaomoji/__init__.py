"""The multimodal evidence of docs/kaomoji.md: `python -m examples.kaomoji`."""
