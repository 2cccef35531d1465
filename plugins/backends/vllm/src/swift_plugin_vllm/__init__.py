"""The engine `vllm`: vLLM's own server in an environment and a process of its own."""
