"""The one fork server of a test process: it imports what every test needs, once.

``multiprocessing`` keeps a single fork server per process, so that the pool of ranks and the launcher of
entry points must agree on what it preloads.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_HOMES = (ROOT, ROOT / "tests" / "functional_tests")
_PRELOADED = ["megatron.core.device_backends", "torch", "torch.distributed", "pretrain_gpt", "pytest"]


def context() -> multiprocessing.context.ForkServerContext:
    """Context whose processes start as forks of an interpreter with torch and the entry point loaded."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    # A new interpreter: it finds the repository through its environment. This process keeps its own.
    before = os.environ.get("PYTHONPATH")
    paths = [str(home) for home in _HOMES]
    inherited = [p for p in (before or "").split(os.pathsep) if p and p not in paths]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths + inherited)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ |= {} if before is None else {"PYTHONPATH": before}
    return server


def share_import_path(path: list[str]) -> None:
    """Let this process import what the process with ``sys.path == path`` can."""
    sys.path[:] = path
