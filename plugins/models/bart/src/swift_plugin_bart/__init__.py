"""BART and other encoder-decoders: mBART, Pegasus, Blenderbot, Marian, NLLB, M2M-100, LED, ProphetNet."""
