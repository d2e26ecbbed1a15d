"""Old import path of ``megatron.core.extensions.transformer_engine``."""

from megatron.core.extensions.transformer_engine import *  # noqa: F403
