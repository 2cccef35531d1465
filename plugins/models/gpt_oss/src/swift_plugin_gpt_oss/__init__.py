"""gpt-oss of OpenAI."""
