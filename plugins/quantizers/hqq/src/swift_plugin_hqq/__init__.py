"""Half-quadratic quantization (HQQ) of a model's linear layers, on the CPU or a GPU, saved as safetensors."""
