"""Import paths of the time before ``megatron.core``, kept for scripts that still use them."""
