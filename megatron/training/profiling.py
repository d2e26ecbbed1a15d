"""The profiler of ``--profile``: the device's own where its package has one, else torch's."""

import os
from argparse import Namespace
from typing import Any

import torch

from megatron.core import accelerator
from megatron.training.utils import print_rank_0


def make_profiler(args: Namespace) -> Any:
    """A profiler with ``start``, ``step`` and ``stop`` that writes one trace per rank into a directory.

    Torch's own is readable by TensorBoard and by chrome://tracing. ``--use-pytorch-profiler`` asks for it
    where the device has another; it then records the host alone, because what it can see of such a device
    is up to the device's package and may end the process.
    """
    directory = args.tensorboard_dir or os.path.join(args.save or ".", "profile")
    own = accelerator.companion("make_profiler")
    name = "torch's" if own is None or args.use_pytorch_profiler else f"the {accelerator.device_type()}'s"
    print_rank_0(
        f"profiling iterations {args.profile_step_start} to {args.profile_step_end} into {directory}, "
        f"by {name} profiler"
    )
    if own is not None and not args.use_pytorch_profiler:
        return own(directory, max(1, args.profile_step_end - args.profile_step_start))
    return torch.profiler.profile(
        activities=None if own is None else [torch.profiler.ProfilerActivity.CPU],
        record_shapes=True,
        on_trace_ready=torch.profiler.tensorboard_trace_handler(directory),
    )
