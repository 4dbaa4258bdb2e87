"""Our layers beside others' code: the same weights and tokens, the same loss and gradients.

    python -m examples.parity                          # prints the table of docs/parity.md
    python -m examples.parity --into docs/parity.md    # and puts it there
    python -m examples.parity peft mixlora             # of these packages alone

A package that wants other versions than this environment has goes into a folder of its own, which only its
comparisons see; the table names the command of each that is missing.
"""
