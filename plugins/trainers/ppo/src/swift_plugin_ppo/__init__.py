"""The trainer ppo: proximal policy optimisation with a value model."""
