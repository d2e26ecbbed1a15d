"""Replacements, under the paths of what they replace."""
