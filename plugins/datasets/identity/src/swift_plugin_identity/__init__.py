"""A packaged data set that teaches a model its name and its maker."""
