"""OpenBuddy: multilingual chat models on Llama, Mistral, Mixtral and others."""
