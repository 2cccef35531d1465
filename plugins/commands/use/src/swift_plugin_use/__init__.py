"""The commands infer, chat, eval, quantize and export: a model at work, through any engine."""
