"""Nodes, edges and circuits: approximated by gradients, patched exactly."""
