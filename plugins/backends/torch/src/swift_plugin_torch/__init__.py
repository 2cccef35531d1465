"""The torch backend and the in-process engine on transformers."""
