"""Base of language models."""
