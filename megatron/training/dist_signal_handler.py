"""Stopping all ranks after the same iteration, and a save, when one of them receives a signal."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron.core.process_groups import message_device


def get_world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _device_of(group: torch.distributed.ProcessGroup | None, local_rank: int | None) -> torch.device:
    if not torch.distributed.is_initialized():
        return torch.device("cpu")
    device = message_device(group)
    return device if local_rank is None or device.type == "cpu" else torch.device(device.type, local_rank)


def all_gather_item(
    item: Any,
    dtype: torch.dtype,
    group: torch.distributed.ProcessGroup | None = None,
    async_op: bool = False,
    local_rank: int | None = None,
) -> list[Any]:
    """One scalar from every rank of a group, in rank order; ``[item]`` without torch.distributed.

    Args:
        item: number or flag.
        dtype: type in which it travels.
        group: group to gather over; None is the whole world.
        async_op: accepted for callers' sake; the values are needed at once, so the call waits.
        local_rank: see :func:`get_device`.
    """
    if not torch.distributed.is_initialized():
        return [item]
    own = torch.tensor([item], dtype=dtype, device=_device_of(group, local_rank))
    gathered = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, own, group=group)
    # Copied to the host at once: reading values one by one would synchronise each time.
    return torch.cat(gathered).tolist()


class DistributedSignalHandler:
    """Context in which a signal is recorded instead of ending the process.

    Args:
        sig: the signal, SIGTERM by default: what schedulers send before they take a machine back.
    """

    def __init__(self, sig: int = signal.SIGTERM):
        self.sig = sig
        self._received = 0
        self._installed = False
        self._previous: Any = None

    def signals_received(self) -> list[bool]:
        """Whether each rank has received the signal. All ranks must call this together."""
        return [number > 0 for number in all_gather_item(self._received, dtype=torch.int32)]

    def signal_of_any_rank(self) -> int:
        """Number of a signal that some rank has received, the same on all; 0 if none has.

        All ranks must call this together.
        """
        return max(all_gather_item(self._received, dtype=torch.int32))

    def record(self, number: int) -> None:
        """Record a signal that another handler has caught."""
        self._received = self._received or number

    def __enter__(self) -> "DistributedSignalHandler":
        self._received = 0
        self._previous = signal.getsignal(self.sig)
        signal.signal(self.sig, self._record)
        self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.record(signum)

    def release(self) -> bool:
        """Put the previous handler back; False if that has been done already."""
        if not self._installed:
            return False
        signal.signal(self.sig, self._previous)
        self._installed = False
        return True


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def get_device(local_rank: int | None = None) -> torch.device:
    """Device of flags exchanged in the default group.

    Args:
        local_rank: index of the device, where it is one; None takes the current one.
    """
    return _device_of(None, local_rank)
