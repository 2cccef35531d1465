"""Idefics and SmolVLM of Hugging Face."""
