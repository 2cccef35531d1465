"""Nemotron, Nemotron-H and Audio Flamingo of NVIDIA, and the derived Llama-3.1-Nemotron."""
