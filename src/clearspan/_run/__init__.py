"""Runs with hooks, interventions, a cache, or a generation."""
