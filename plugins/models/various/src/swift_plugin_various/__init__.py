"""Models of makers with one or two architectures, such as Apertus, Arcee, Aria, Fuyu, Helium, Inkling and Solar."""
