"""Ascend NPU replacements for the overridable functions of ``megatron.core``.

``megatron.core.overrides.load`` calls :func:`activate` when the device in use is an NPU; a script of one's
own says ``import megatron_npu.megatron_adaptor``. A replacement lives under the path of the default it
replaces: ``megatron_npu/core/fusions/fused_layer_norm.py`` for ``megatron/core/fusions/fused_layer_norm.py``.

``python -m megatron_npu`` prints what is active, ``python -m megatron_npu check`` compares every replacement
with its default on the device at hand.
"""

import megatron  # before all else: says which Python is needed

# isort: split
from megatron_npu.companion import (
    activate,
    communicator_options,
    describe_communicators,
    is_wanted,
    make_profiler,
)
