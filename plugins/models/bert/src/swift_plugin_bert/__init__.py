"""BERT and other encoders: RoBERTa, ModernBERT, DeBERTa, ALBERT, ELECTRA, XLM-R and more."""
