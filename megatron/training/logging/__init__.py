"""Logs of a run: iteration lines, TensorBoard and W&B points, throughput figures."""
