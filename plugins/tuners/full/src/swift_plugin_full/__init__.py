"""The model's own weights as what is trained."""
