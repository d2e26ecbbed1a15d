"""Processes in which the real torch_npu runs over the CANN stub, and why there may be none.

torch_npu changes torch for good when it is imported, and emulated kernels replace those of a device, so
nothing of it happens in the test process: tests of a level live in ``inner/`` and run in a pytest of their
own, one process per chip.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npu.virtual import cann

ROOT = Path(__file__).resolve().parents[2]
INNER = Path(__file__).resolve().parent / "inner"


def environment(soc: str = "Ascend910B2", devices: int = 1, **more: str) -> dict[str, str]:
    """Variables of a process that sees ``devices`` NPUs of a kind."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(cann.build()),
        "STUB_NPU_COUNT": str(devices),
        "STUB_NPU_SOC": soc,
        "ASCEND_LAUNCH_BLOCKING": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "MEGATRON_DEVICE": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def run(*words: str, soc: str = "Ascend910B2", devices: int = 1, **more: str) -> subprocess.CompletedProcess:
    """``python WORDS`` over the stub; skips the calling test where that cannot be."""
    reason = cann.why_not()
    if reason is not None:
        pytest.skip(reason)
    return subprocess.run(
        [sys.executable, *words],
        env=environment(soc, devices, **more),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
    )


def run_inner(pattern: str, **where: str) -> str:
    """Runs the tests of the files ``inner/PATTERN`` and returns pytest's summary; raises what they print."""
    done = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"python_files={pattern}", str(INNER), **where
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip().splitlines()[-1]


def on_virtual_npus(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """``python -m megatron_npu.virtual WORDS``; skips the calling test where that cannot be."""
    reason = cann.why_not()
    if reason is not None:
        pytest.skip(f"no virtual NPU: {reason}")
    return subprocess.run(
        [sys.executable, "-m", "megatron_npu.virtual", *words],
        env=os.environ | variables,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
    )
