"""Runs of ``pretrain_gpt.py`` on virtual NPUs, for tests.

One process with virtual NPUs serves all runs of a test file: it imports torch and torch_npu once and forks
(``tests.functional_tests.launcher``). Torch without torch_npu stays in the test process.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npu.virtual.cann import why_not
from megatron_npu.virtual.environment import environment
from tests.functional_tests.launcher import Run
from tests.npu.ground import ROOT


class Machine:
    """A process on a machine with virtual NPUs."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def pretrain_gpt(self, world_size: int, argv: list[str], tmp_path: Path) -> list[Run]:
        """Runs ``pretrain_gpt.py argv``, one rank on each NPU, to a good end.

        Args:
            world_size: number of ranks.
            argv: command-line words.
            tmp_path: working directory; afterwards ``calls_RANK.json`` in it counts Ascend's operators.

        Returns:
            The runs by rank.
        """
        request = world_size, [str(word) for word in argv], tmp_path
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        return [run.check() for run in pickle.load(self._process.stdout)]


@contextlib.contextmanager
def machine(devices: int = 4, soc: str = "Ascend910B2") -> Iterator[Machine]:
    """A machine with virtual NPUs; skips the calling tests where there can be none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no virtual NPU: {reason}")
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env=environment(devices, soc) | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Machine(process)
    finally:
        process.stdin.close()
        process.wait(60)


def serve() -> None:
    """Answers requests on stdin until its end."""
    from tests.functional_tests.launcher import pretrain_gpt_ranks

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed by accident must not become an answer
    with contextlib.suppress(EOFError):
        while True:
            world_size, argv, tmp_path = pickle.load(sys.stdin.buffer)
            variables = {"MEGATRON_DEVICE": "npu", "VIRTUAL_NPU_CALLS": str(tmp_path)}
            runs = pretrain_gpt_ranks(world_size, argv, tmp_path, env=variables)
            pickle.dump(runs, answers)
            answers.flush()


if __name__ == "__main__":
    serve()
