"""The one fork server of a test process: it imports what every test needs, once.

``multiprocessing`` keeps a single fork server per process, so that the pool of ranks and the launcher of
entry points must agree on what it preloads.
"""

import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_HOMES = (ROOT, ROOT / "tests" / "functional_tests")
_PRELOADED = ["torch", "torch.distributed", "pretrain_gpt", "pytest"]


def context() -> multiprocessing.context.ForkServerContext:
    """Context whose processes start as forks of an interpreter with torch and the entry point loaded."""
    server = multiprocessing.get_context("forkserver")
    # A new interpreter: it finds the repository through its environment.
    paths = [str(home) for home in _HOMES]
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in paths]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths + inherited)
    server.set_forkserver_preload(_PRELOADED)
    return server


def share_import_path(path: list[str]) -> None:
    """Let this process import what the process with ``sys.path == path`` can."""
    sys.path[:] = path
