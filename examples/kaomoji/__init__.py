"""The multimodal experiment of docs/kaomoji.md: `python -m examples.kaomoji`."""
