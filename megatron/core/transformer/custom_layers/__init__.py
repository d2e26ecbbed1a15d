"""Old import path of ``megatron.core.extensions``."""
