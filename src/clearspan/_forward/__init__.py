"""A forward of the model: what it is given, the run of all blocks or some, and the logits."""
