"""The cost of the kernels: from compiled code, from counted bytes and launches, and from timings."""
