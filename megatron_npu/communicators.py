"""Sizes of HCCL's communication buffers, by what a group is for.

A communicator takes two buffers of the device's memory when it is first used, ``HCCL_BUFFSIZE`` MB each (200
where unset). A message that is larger goes in pieces, so a small buffer costs speed and nothing else. Groups
that carry gradients, weights or activations keep HCCL's size; those that carry norms, flags and counters, or
one gradient of an embedding a step, get a small one. A size of the user's goes before both.
"""

import os
from collections.abc import Mapping
from typing import Any

from megatron.core.errors import ConfigError

_SIZE, _P2P_SIZE = "HCCL_BUFFSIZE", "P2P_HCCL_BUFFSIZE"
_HCCL_MB, _P2P_MB = 200, 20
SMALL_MB = 20
# Labels of megatron.core.parallel_state, and the group of all ranks.
SMALL = frozenset({"world", "mp", "embd", "pos_embd", "tp_cp", "tp_dp", "tp_dp_cp", "tp_ep_pp"})
_PIPELINE = "pp"


def buffer_mb(labels: tuple[str, ...], buffers_mb: Mapping[str, int]) -> int:
    """Size of each of the two buffers of a group: the largest that was asked for, or that a use of it needs.

    Args:
        labels: what the group is for.
        buffers_mb: sizes that were asked for, by label; one of them speaks for all uses of a group. That of
            stages may follow from the model and not from a user, so it speaks for itself alone.
    """
    default = _from_environment(_SIZE, _HCCL_MB, least=1)
    asked = [buffers_mb[label] for label in labels if label in buffers_mb and label != _PIPELINE]
    return max(
        asked
        or [buffers_mb.get(label, min(SMALL_MB, default) if label in SMALL else default) for label in labels]
    )


def options(labels: tuple[str, ...], buffers_mb: Mapping[str, int]) -> Any:
    """Options of torch_npu's HCCL group with its size; arguments as :func:`buffer_mb`."""
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL  # pyright: ignore[reportMissingImports]

    made = ProcessGroupHCCL.Options()
    made.hccl_config = {"hccl_buffer_size": buffer_mb(labels, buffers_mb)}
    return made


def describe(groups: list[tuple[tuple[str, ...], int]], buffers_mb: Mapping[str, int]) -> str:
    """One line: what the communicators of a rank take of its NPU once all of them have been used.

    Args:
        groups: labels and number of members of each; groups of one never communicate.
        buffers_mb: as for :func:`buffer_mb`.
    """
    sizes = {"+".join(labels): buffer_mb(labels, buffers_mb) for labels, members in groups if members > 1}
    if any(members > 1 and _PIPELINE in labels for labels, members in groups):
        sizes["sending between stages"] = _from_environment(_P2P_SIZE, _P2P_MB, least=0)
    parts = ", ".join(f"{name} 2 x {size}" for name, size in sizes.items())
    total = 2 * sum(sizes.values())
    return f"HCCL buffers take up to {total} MB of an NPU's memory" + (f": {parts}" if parts else "")


def _from_environment(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"{name}={text}: give a whole number of MB from {least} on, for instance {default}")
    return int(text)
