"""Gemma of Google: text, vision and omni models, PaliGemma, T5Gemma, EmbeddingGemma, RecurrentGemma."""
