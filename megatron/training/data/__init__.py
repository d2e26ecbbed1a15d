"""Loaders and samplers of a training run."""
