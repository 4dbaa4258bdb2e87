"""vLLM itself on the CPU: `make test-vllm` creates a separate environment and runs these tests in it."""
