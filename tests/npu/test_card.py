"""Where there is a real NPU: every replacement against its default, on it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu.ground import ROOT


@pytest.mark.skipif(not list(Path("/dev").glob("davinci[0-9]*")), reason="no NPU in this machine")
def test_every_replacement_on_the_card() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_npu", "check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
