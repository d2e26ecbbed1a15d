"""Ascend NPU replacements for the overridable functions of ``megatron.core``.

Loaded by ``megatron.core.overrides.load`` when the device in use is an NPU. A replacement lives under the
path of the default it replaces: ``megatron_npu/core/fusions/rms_norm.py`` for
``megatron/core/fusions/rms_norm.py``.
"""
