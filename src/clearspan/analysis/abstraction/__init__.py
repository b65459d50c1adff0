"""Causal abstraction: interchange interventions, and alignments that are learned."""
