"""Llama of Meta and models derived from it: Yi, Atom, Ziya, Mengzi, Chinese-LLaMA, MiniMind, Megrez."""
