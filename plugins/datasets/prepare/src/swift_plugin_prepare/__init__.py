"""The data of a run, in the order it flows: rows, encode with its account, workers, store, prepare, stream."""
