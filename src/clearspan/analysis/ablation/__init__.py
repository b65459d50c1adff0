"""What is lost without heads, layers or neurons."""
