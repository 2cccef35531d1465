"""Low-rank adapters on peft."""
