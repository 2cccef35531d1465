"""Falcon, Falcon Mamba and Falcon-H1 of the Technology Innovation Institute."""
