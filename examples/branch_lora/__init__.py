"""The evidence of docs/branch_lora.md: `python -m examples.branch_lora`."""
