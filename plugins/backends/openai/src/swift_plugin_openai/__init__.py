"""The engine `openai`, which speaks to a server, and what engines that start a server of their own share."""
