"""Baichuan of Baichuan Intelligence."""
