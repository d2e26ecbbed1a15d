"""What the adaptor lines of scripts do: everything on an NPU, else nothing; and one line that says so."""

import multiprocessing
import os
import sys

from megatron_npu import activate, versions

# Where launchers put the number of a rank.
_RANK_WORDS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def adapt() -> str | None:
    """Puts the replacements in place where there is an NPU; else says why there is none.

    Raises:
        ConfigError: there is one, and its software does not fit.
    """
    reason = versions.why_no_npu()
    if reason is None:
        activate()
    return reason


def say(line: str) -> None:
    """Prints ``line`` on stderr once per job: on its first rank, and not in processes that a rank starts."""
    rank = next((os.environ[word] for word in _RANK_WORDS if word in os.environ), "0")
    # A process that a rank spawns runs the script once more.
    if rank == "0" and multiprocessing.current_process().name == "MainProcess":
        print(line, file=sys.stderr, flush=True)
