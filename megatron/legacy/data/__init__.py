"""Data sets under their import paths of the time before ``megatron.core``."""
