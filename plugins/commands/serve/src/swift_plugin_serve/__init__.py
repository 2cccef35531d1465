"""The command `serve`: an OpenAI-compatible server over any engine, and a chat page."""
