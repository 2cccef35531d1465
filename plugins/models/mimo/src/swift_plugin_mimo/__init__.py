"""MiMo and MiDashengLM of Xiaomi."""
