"""Command, Aya and North of Cohere."""
