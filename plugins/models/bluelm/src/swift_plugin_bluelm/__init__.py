"""BlueLM of vivo."""
