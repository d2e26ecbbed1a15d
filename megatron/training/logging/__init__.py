"""What a run tells its user: the iteration line, TensorBoard and W&B points, throughput figures."""
