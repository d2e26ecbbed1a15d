"""Models: embeddings, a stack of layers, a head."""
