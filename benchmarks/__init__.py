"""What the kernels cost: by the compiler's word, by counted bytes and launches, and by the clock."""
