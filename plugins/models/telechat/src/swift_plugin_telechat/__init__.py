"""TeleChat and TeleChat2 of China Telecom."""
