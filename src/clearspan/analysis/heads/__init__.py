"""What kind of attention heads pay."""
