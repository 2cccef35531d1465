"""Load and faults of `swift-core serve`."""
