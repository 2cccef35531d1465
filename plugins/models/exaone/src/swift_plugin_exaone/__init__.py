"""EXAONE of LG AI Research."""
