"""The small classics: GPT, GPT-2, GPT-Neo, GPT-J, GPT-NeoX, BLOOM, OPT, CodeGen, CTRL, XGLM, BioGPT, XLNet."""
