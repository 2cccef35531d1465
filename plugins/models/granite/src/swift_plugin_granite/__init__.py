"""Granite of IBM: text, mixture of experts, hybrid, vision, speech, and Bamba."""
