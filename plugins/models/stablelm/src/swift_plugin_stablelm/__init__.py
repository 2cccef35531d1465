"""StableLM of Stability AI."""
