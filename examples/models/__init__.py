"""Reference models that the examples share."""
