"""What parts write, read as logits and in vocabulary."""
