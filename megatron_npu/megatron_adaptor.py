"""``import megatron_npu.megatron_adaptor`` right after ``import torch``: all of it, in one line.

On a machine without an NPU nothing is changed, and one line on stderr says so.
"""

import sys

from megatron_npu import activate, versions

_reason = versions.why_no_npu()
if _reason is None:
    activate()
else:
    print(f"megatron_npu: nothing is replaced, {_reason}", file=sys.stderr)
