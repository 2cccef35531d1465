"""The generic family: any architecture of the transformers library, from its own config and tokenizer."""
