"""The experiments of docs/mmolre.md: `python -m examples.mmolre`."""
