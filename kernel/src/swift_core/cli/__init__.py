"""The command line: a lazy click group; each command's module is imported when it is called."""
