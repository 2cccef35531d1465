"""The engine `sglang`: SGLang's own server in an environment and a process of its own, on CUDA."""
