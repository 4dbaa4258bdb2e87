"""What is read from compiled kernels and counted from launches: no clock, and no GPU."""
