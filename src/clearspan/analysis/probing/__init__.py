"""Linear probes of activations."""
