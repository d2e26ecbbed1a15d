"""The application: flags, configs, the training loop, logs and checkpoints."""
