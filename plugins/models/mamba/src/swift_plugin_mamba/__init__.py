"""State-space and recurrent models and their hybrids: Mamba, Mamba-2, Jamba, RWKV, Zamba, xLSTM."""
