"""``import mindspeed.megatron_adaptor`` without MindSpeed: Megatron-NPU's own replacements for the NPU.

On a machine without an NPU nothing is changed. Either way one line on stderr says so, once per job.
"""

import megatron.core.device_backends  # noqa: F401  (before torch)

# isort: split
from megatron_npu import adapting

_reason = adapting.adapt()
adapting.say(
    "mindspeed.megatron_adaptor: MindSpeed is not installed and not needed, Megatron-NPU answers: "
    + (
        "its replacements for the NPU are active (python -m megatron_npu lists them)"
        if _reason is None
        else f"nothing is replaced, {_reason}"
    )
)
