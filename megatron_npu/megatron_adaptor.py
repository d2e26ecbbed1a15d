"""``import megatron_npu.megatron_adaptor`` right after ``import torch``: all of it, in one line.

On a machine without an NPU nothing is changed, and one line on stderr says so, once per job. Before
``import torch`` it does as well, and lets that import succeed where a torch_npu without CANN would end it.
"""

import megatron.core.device_backends  # noqa: F401  (before torch)

# isort: split
from megatron_npu import adapting

_reason = adapting.adapt()
if _reason is not None:
    adapting.say(f"megatron_npu: nothing is replaced, {_reason}")
