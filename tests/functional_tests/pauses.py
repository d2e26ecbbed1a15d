"""Stops a rank at a chosen moment of its run, until the test has done there what it wants to do.

The environment says where: ``PAUSE_AT`` (a name in ``MOMENTS``), ``PAUSE_RANK``, ``PAUSE_ITERATION`` and
``PAUSE_DIRECTORY``, where the file ``paused`` appears and ``go`` is waited for.
"""

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _in_forward(grad: bool) -> bool:
    import torch

    from megatron.training import get_args

    return torch.is_grad_enabled() == grad and get_args().curr_iteration == _iteration()


def _in_save() -> bool:
    from megatron.training import get_args

    return get_args().curr_iteration == _iteration()


def _iteration() -> int:
    """Finished iterations at the moment of the pause."""
    return int(os.environ["PAUSE_ITERATION"])


_SAVE = "megatron.training.checkpointing"
# Moment -> (module, function before which it lies, whether a call is the one).
MOMENTS: dict[str, tuple[str, str, Callable[[], bool]]] = {
    "arguments": ("megatron.training.initialize", "validate_args", lambda: True),
    "rendezvous": ("torch.distributed", "init_process_group", lambda: True),
    "model": ("pretrain_gpt", "model_provider", lambda: True),
    "load": ("megatron.training.model_setup", "load_checkpoint", lambda: True),
    "index": ("megatron.core.datasets.gpt_dataset", "build_gpt_index", lambda: True),
    "training": ("pretrain_gpt", "forward_step", lambda: _in_forward(grad=True)),
    "evaluation": ("pretrain_gpt", "forward_step", lambda: _in_forward(grad=False)),
    "gathering": (f"{_SAVE}.optimizer_state", "gathered_state", _in_save),
    "writing": (f"{_SAVE}.durable", "write_file", _in_save),
    "publishing": (f"{_SAVE}.durable", "sync_directory", _in_save),
    "tracker": (f"{_SAVE}.durable", "replace_file", _in_save),
    "end": ("megatron.training.training", "flush_writers", lambda: True),
}


def pause_where_asked() -> None:
    """Arrange the pause in this process, if it is the rank that pauses."""
    moment = os.environ.get("PAUSE_AT")
    if not moment or os.environ.get("RANK", "0") != os.environ["PAUSE_RANK"]:
        return
    home, name, is_due = MOMENTS[moment]
    module = importlib.import_module(home)
    original = getattr(module, name)
    directory = Path(os.environ["PAUSE_DIRECTORY"])

    def paused(*args: Any, **options: Any) -> Any:
        if not (directory / "paused").exists() and is_due():
            (directory / "paused").touch()
            while not (directory / "go").exists():
                time.sleep(0.01)
        return original(*args, **options)

    setattr(module, name, paused)


if __name__ == "__main__":
    # What pretrain_gpt.py does as a script, so that a launcher can start it.
    from megatron.training.processes import stop_signals

    stop_signals.install(stop_signals.BEFORE_TRAINING)
    import pretrain_gpt
    from megatron.training.entry import run_main

    pause_where_asked()
    run_main(pretrain_gpt.main)
