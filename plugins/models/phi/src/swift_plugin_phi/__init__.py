"""Phi of Microsoft: text, mixture of experts, vision and multimodal models."""
