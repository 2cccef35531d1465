"""Skywork: the 13B models, Skywork-o1 and the reward models."""
