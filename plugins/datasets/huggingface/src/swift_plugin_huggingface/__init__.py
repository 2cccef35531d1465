"""Opens any data file, folder or hub data set, and maps the row shapes in common use to swift-core's standard row."""
