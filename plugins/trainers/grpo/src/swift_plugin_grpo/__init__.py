"""The trainer grpo and its family, and what other on-policy trainers build on: prompts, rollouts, environments, stages."""
