"""The experiments of docs/branch_lora.md: `python -m examples.branch_lora`."""
