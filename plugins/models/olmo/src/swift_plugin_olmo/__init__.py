"""OLMo, OLMoE, FlexOlmo and Molmo of Ai2."""
