"""The evidence of docs/mmolre.md: `python -m examples.mmolre`."""
