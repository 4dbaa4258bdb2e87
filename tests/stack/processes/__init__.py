"""Checks that run in two processes at once: torchrun, gloo, CPUs (see test_distributed.py)."""
