"""T5 and its kind: mT5, UMT5, ByT5, LongT5, Switch Transformers, FLAN-T5."""
