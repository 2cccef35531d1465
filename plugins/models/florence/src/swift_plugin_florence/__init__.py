"""Florence-2 and Kosmos of Microsoft."""
