"""Mistral, Mixtral, Ministral, Pixtral, Devstral, Magistral and Voxtral of Mistral AI, and models derived from them."""
