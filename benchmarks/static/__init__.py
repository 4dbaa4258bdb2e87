"""Costs read from compiled kernels and counted from launches, without a clock or a GPU."""
