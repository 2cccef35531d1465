"""Scores a model's answers against the references in the rows themselves, and the perplexity of what is trained."""
