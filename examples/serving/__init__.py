"""A mixture of LoRA experts behind vLLM's OpenAI-compatible server: `make demo-vllm`."""
