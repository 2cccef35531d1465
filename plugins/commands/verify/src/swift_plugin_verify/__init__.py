"""The command `models verify`: a tiny random model of each architecture goes through all that a run does to a model."""
