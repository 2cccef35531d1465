"""LLaVA and models built like it: LLaVA-NeXT, OneVision, Video-LLaVA, ViP-LLaVA."""
