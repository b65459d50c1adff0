"""Everything about one text and one model."""
