"""Qwen of Alibaba: text, mixture of experts, vision, audio and omni models, from Qwen to Qwen3.5."""
