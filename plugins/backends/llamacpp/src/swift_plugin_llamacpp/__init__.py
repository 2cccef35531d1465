"""The engine `llamacpp`: GGUF files through llama.cpp, in an environment and a process of its own."""
