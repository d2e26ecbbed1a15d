"""``import megatron_npu.megatron_adaptor`` right after ``import torch``: all of it, in one line.

On a machine without an NPU nothing is changed, and one line on stderr says so. Before ``import torch`` it
does as well, and lets that import succeed where a torch_npu without CANN would end it.
"""

import sys

import megatron.core.device_backends  # noqa: F401  (before torch)

# isort: split
from megatron_npu import activate, versions

_reason = versions.why_no_npu()
if _reason is None:
    activate()
else:
    print(f"megatron_npu: nothing is replaced, {_reason}", file=sys.stderr)
