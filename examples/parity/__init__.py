"""Compares our layers with other packages: the same weights and tokens, the same loss and gradients.

    python -m examples.parity                          # prints the table of docs/parity.md
    python -m examples.parity --into docs/parity.md    # updates the table in the file
    python -m examples.parity peft mixlora             # only these packages

A package that needs other versions than those of this environment is installed into a separate folder, on
the path of its own comparisons only; for each missing package the table gives the install command.
"""
