"""Mixtures of experts: the router, the exchange of tokens, the experts."""
