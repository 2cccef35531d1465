"""The trainer gkd: generalised knowledge distillation."""
