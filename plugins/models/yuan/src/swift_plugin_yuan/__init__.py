"""Yuan 2.0 of IEIT."""
