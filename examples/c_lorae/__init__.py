"""The evidence of docs/c_lorae.md: `python -m examples.c_lorae`."""
