"""Attention over a sequence that is split between ranks.

A sequence is cut into 2*CP chunks; rank r holds chunks r and 2*CP-1-r, so that under a causal mask all ranks
have the same work. ``zigzag`` knows that order, ``plan`` which blocks are visible, ``ring``, ``gather`` and
``heads`` each move what is missing in their own way, ``attention`` chooses.
"""
