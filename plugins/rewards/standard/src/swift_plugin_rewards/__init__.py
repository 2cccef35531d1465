"""Rewards: what tells how good an answer is, for `sample` and for the trainers that learn from rewards."""
