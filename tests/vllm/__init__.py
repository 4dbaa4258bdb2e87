"""vLLM itself on the CPU: `make test-vllm` makes an environment of its own and runs these tests in it."""
