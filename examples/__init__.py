"""Runnable examples on real data: `python -m examples.demo`."""
