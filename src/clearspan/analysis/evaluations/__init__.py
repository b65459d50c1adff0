"""How well a model does on generated data."""
