"""Directions that are added to a run."""
