"""Level 3: the virtual NPU as a device, its collectives, and what is said where there can be none."""

import subprocess
import sys

import pytest

from tests.npu.virtual.environment import ROOT, why_not

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def on_virtual_npus(*words: str) -> subprocess.CompletedProcess:
    """``python -m tests.npu.virtual WORDS``; skips the calling test where that cannot be."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no virtual NPU: {reason}")
    return subprocess.run(
        [sys.executable, "-m", "tests.npu.virtual", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )


@pytest.mark.parametrize("file", ["virtual_device.py", "virtual_ranks.py"])
def test_torch_works_on_it(file: str, capsys: pytest.CaptureFixture) -> None:
    done = on_virtual_npus("--", "python", *PYTEST, "-o", f"python_files={file}", "tests/npu/inner")
    assert done.returncode == 0, done.stdout
    with capsys.disabled():
        print(f"\nNPU level 3, {file}: {done.stdout.strip().splitlines()[-1]}")


def test_a_command_gets_the_devices_that_were_asked_for() -> None:
    code = "import torch; print(torch.npu.device_count(), torch.npu.get_device_name(1))"
    memory = "print(torch.npu.mem_get_info(2)[1] >> 30)"
    options = ("--devices", "3", "--soc", "Ascend910_9382", "--memory", "32")
    done = on_virtual_npus(*options, "--", "python", "-c", f"{code}; {memory}")
    assert done.stdout.split()[-3:] == ["3", "Ascend910_9382", "32"], done.stdout


def test_status_of_the_command_is_ours() -> None:
    assert on_virtual_npus("--", "python", "-c", "raise SystemExit(7)").returncode == 7
    missing = on_virtual_npus("--", "no-such-command")
    assert missing.returncode == 1 and "error: no-such-command: No such file" in missing.stdout
    none = on_virtual_npus("--devices", "0", "--", "python")
    assert none.returncode == 2 and "at least one is needed" in none.stdout
