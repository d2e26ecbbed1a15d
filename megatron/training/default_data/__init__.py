"""A small real corpus that every machine has: the sources of Python's own standard library.

``python -m megatron.training.default_data`` makes the corpus, a byte-level BPE trained on it and the
``.bin/.idx`` data set once, keeps them in a cache, and prints where they are as shell assignments.
"""
