"""The state of a process that a job can change, and how it comes back.

Everything the library keeps per process is named here; a test of the pool looks for leftovers.
"""

import gc
import logging
import os
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Home:
    """What a worker looked like before its first job."""

    environment: dict[str, str]
    directory: str
    argv: list[str]
    handlers: list[logging.Handler]


def take() -> Home:
    """Remember the state of this process."""
    return Home(dict(os.environ), os.getcwd(), list(sys.argv), list(logging.getLogger().handlers))


def reset(home: Home) -> None:
    """Bring this process back to ``home``: no process groups, no library state, fixed random generators."""
    from megatron.core import overrides, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import deferred_gradients, rng_tracker
    from megatron.core.utils.straggler import StragglerDetector
    from megatron.training import checkpointing, global_vars

    parallel_state.destroy_model_parallel()
    global_vars.destroy_global_vars()  # the microbatch calculator included
    rerun_state_machine.destroy_rerun_state_machine()
    rng_tracker._tracker = None
    deferred_gradients.discard()
    overrides.enable_all()
    StragglerDetector().close()
    StragglerDetector._instance = None
    checkpointing.set_checkpoint_version(None)
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    os.environ.clear()
    os.environ.update(home.environment)
    os.chdir(home.directory)
    sys.argv = list(home.argv)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h not in home.handlers]:
        root.removeHandler(handler)
    gc.enable()
    gc.collect()
