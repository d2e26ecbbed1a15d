"""Comparison of every replacement with its default: the calls, and the distances of their results."""
