"""State of the test process that outlives a test, and the tests that change it.

A test that leaves something behind passes, and another one fails, or passes for the wrong reason, only when
it runs after it. So every test is compared with itself: what is there when its fixtures begin must be there
when they have ended.
"""

import copy
import logging
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

# By pytest for every test, and by the first import of the package that a test makes.
_SET_BY_OTHERS = ("PYTEST_CURRENT_TEST", "TORCH_CPP_LOG_LEVEL")
# Not SIGCHLD, which the loader of torch takes once and for all.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE")
    if hasattr(signal, name)
]


def take() -> dict[str, Any]:
    """What a test must leave as it was, by name. Modules that are not imported have no state."""
    root = logging.getLogger()
    found = {
        "working directory": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in _SET_BY_OTHERS},
        "sys.argv": list(sys.argv),
        "sys.path": set(sys.path),  # programs of the project begin by adding their own folder
        "standard streams": [id(sys.__stdout__), id(sys.__stderr__)],
        "umask": _umask(),
        "signal handlers": {number.name: signal.getsignal(number) for number in _SIGNALS},
        "logging": (root.level, [type(h).__name__ for h in root.handlers if not _is_of_pytest(h)]),
        # The ranks of the pool are daemons, and stay for the next test.
        "child processes": {child.pid for child in multiprocessing.active_children() if not child.daemon},
    }
    for name, read in _OF_MODULES.items():
        module = sys.modules.get(name)
        if module is not None:
            found |= {f"{name}: {what}": value for what, value in read(module).items()}
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each thing that changed. What a module holds on import is not a change."""
    lines = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old == new:
            continue
        if isinstance(old, dict):
            changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
            lines += [f"{name}: {k} was {old.get(k)!r}, is {new.get(k)!r}" for k in sorted(changed)]
        else:
            lines.append(f"{name} was {old!r}, is {new!r}")
    return sorted(lines)


class PassingState:
    """What models change in passing, put back after a test: the random streams, the rerun machine, and the
    losses of experts with the scale of their gradients.
    """

    _TRACKER = "megatron.core.tensor_parallel.rng_tracker"
    _RERUN = "megatron.core.rerun_state_machine"
    _LOSSES = "megatron.core.transformer.moe.moe_utils"

    def __init__(self) -> None:
        tracker = getattr(sys.modules.get(self._TRACKER), "_tracker", None)
        self._streams = None if tracker is None else copy.deepcopy(vars(tracker))
        self._machine = getattr(sys.modules.get(self._RERUN), "_GLOBAL_RERUN_STATE_MACHINE", None)

    def put_back(self) -> None:
        """Bring all of it back to what it was; figures of experts are forgotten."""
        if (tracker := getattr(sys.modules.get(self._TRACKER), "_tracker", None)) is not None:
            tracker.reset()
            vars(tracker).update(self._streams or {})
        if self._RERUN in sys.modules:
            sys.modules[self._RERUN]._GLOBAL_RERUN_STATE_MACHINE = self._machine
        if (losses := sys.modules.get(self._LOSSES)) is not None:
            losses.parallel_state.get_moe_layer_wise_logging_tracker().clear()
            losses.MoEAuxLossAutoScaler.set_loss_scale(sys.modules["torch"].tensor(1.0))


def seed(number: int) -> None:
    """Seed the generators that are loaded, so that no test depends on what others drew."""
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _is_of_pytest(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest")


def _of_torch(torch: Any) -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }


_OF_MODULES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "torch": _of_torch,
    "megatron.core.parallel_state": lambda m: {"initialized": m.is_initialized()},
    "megatron.core.overrides": lambda m: {
        "switched off": set(m._disabled),
        # On a virtual NPU they are loaded by the first test that looks for its device, and stay.
        "replaced": {name: point.replacement for name, point in m._points.items() if point.replacement}
        if "STUB_NPU_COUNT" not in os.environ
        else {},
    },
    "megatron.core.num_microbatches_calculator": lambda m: {
        "calculator": m._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    },
    "megatron.core.tensor_parallel.deferred_gradients": lambda m: {"pending": m.pending()},
    "megatron.training.global_vars": lambda m: {"variables": dict(m._REGISTRY)},
    "megatron.training.checkpointing": lambda m: {"version": m.get_checkpoint_version()},
}
