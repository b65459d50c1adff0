"""Weights under canonical names: views, factored products, processing."""
