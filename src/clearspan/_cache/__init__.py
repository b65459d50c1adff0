"""What a cache does with the values of a run."""
