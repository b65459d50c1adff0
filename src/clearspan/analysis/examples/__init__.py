"""Where in a stream of texts a feature is largest."""
