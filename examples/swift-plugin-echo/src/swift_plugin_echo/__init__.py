"""The tutorial plugin of swift-core: the engine `echo` and the metric `length`."""
