"""tests_gpt/env_npu.sh, sourced by a strict shell on a machine made of directories."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tests_gpt" / "env_npu.sh"
CLEARED = ("MEGATRON_DEVICE", "ASCEND_", "HCCL_", "PYTORCH_", "CANN_", "LD_LIBRARY_PATH", "DEV_DIR")


class Machine:
    """Directories in the places of /dev and /usr/local/Ascend."""

    def __init__(self, root: Path):
        self.dev, self.ascend = root / "dev", root / "Asc end"
        self.dev.mkdir()
        toolkit = self.ascend / "ascend-toolkit"
        toolkit.mkdir(parents=True)
        # As CANN's own: an unset variable, a variable of its own, and a test that fails at the end.
        lines = (
            f'export ASCEND_HOME_PATH="{toolkit}/latest"',
            'export LD_LIBRARY_PATH="$ASCEND_HOME_PATH/lib64:$LD_LIBRARY_PATH"',
            '[ -n "$UNSET" ]',
        )
        (toolkit / "set_env.sh").write_text("\n".join(lines) + "\n")

    def source(self, times: int = 1, **env: str) -> tuple[str, dict[str, str]]:
        """(what it printed, the environment afterwards); the shell fails on errors and unset variables."""
        base = {k: v for k, v in os.environ.items() if not k.startswith(CLEARED)}
        base |= {"DEV_DIR": str(self.dev), "ASCEND_ROOT": str(self.ascend)}
        base["ASCEND_INSTALL_INFO"] = str(self.dev / "none")
        source = f'source "{SCRIPT}"; ' * times
        command = f"set -eu; {source} echo $- >&2; env -0"
        done = subprocess.run(["bash", "-c", command], env=base | env, capture_output=True, check=True)
        printed, _, rest = done.stdout.rpartition(b"\n")
        flags = done.stderr.decode().split()[-1]
        assert "e" in flags and "u" in flags, "it left the shell's options changed"
        words = (rest or done.stdout).split(b"\0")
        after = dict(word.decode().split("=", 1) for word in words if b"=" in word)
        return printed.decode(), {
            k: v for k, v in after.items() if base.get(k) != v and k not in env and k != "_"
        }


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_a_card_is_told_and_left_as_it_is(machine: Machine) -> None:
    printed, changed = machine.source()
    assert printed.startswith("env_npu: no NPU: ") and "MEGATRON_DEVICE=npu" in printed
    assert printed.count("\n") == 0 and changed == {"MEGATRON_NPU_ENVIRONMENT": "no-npu"}


@pytest.mark.parametrize("file", ["davinci0", "davinci5", "davinci_manager"])
def test_a_card_is_enough(machine: Machine, file: str) -> None:
    """A container may have been given any of them."""
    (machine.dev / file).touch()
    printed, changed = machine.source()
    assert "env_npu: CANN: " in printed
    assert changed["ASCEND_HOME_PATH"].endswith("ascend-toolkit/latest")
    assert f"env_npu: set ASCEND_HOME_PATH={changed['ASCEND_HOME_PATH']}" in printed
    assert changed["HCCL_CONNECT_TIMEOUT"] == "1200"
    assert changed["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("HCCL_CONNECT_TIMEOUT", "PYTORCH_NPU_ALLOC_CONF"):
        assert f"env_npu: set {name}={changed[name]}" in printed


def test_variables_set_before_are_kept(machine: Machine) -> None:
    own = {"HCCL_CONNECT_TIMEOUT": "60", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    printed, changed = machine.source(MEGATRON_DEVICE="npu", **own)
    assert "HCCL" not in printed and "HCCL_CONNECT_TIMEOUT" not in changed
    assert "PYTORCH_NPU_ALLOC_CONF" not in changed  # the allocator refuses both names at once


def test_sourcing_twice_equals_sourcing_once(machine: Machine) -> None:
    once = machine.source(MEGATRON_DEVICE="npu")[1]
    printed, twice = machine.source(2, MEGATRON_DEVICE="npu")
    assert twice == once
    assert "already in the environment" in printed and printed.count("set HCCL_CONNECT_TIMEOUT") == 1


def test_the_driver_is_found(machine: Machine) -> None:
    for name in ("common", "driver"):
        (machine.ascend / "driver" / "lib64" / name).mkdir(parents=True)
    printed, changed = machine.source(MEGATRON_DEVICE="npu")
    places = changed["LD_LIBRARY_PATH"].split(":")
    lib64 = machine.ascend / "driver" / "lib64"
    assert [str(lib64), str(lib64 / "common"), str(lib64 / "driver")] == places[-3:]
    assert printed.count("to LD_LIBRARY_PATH") == 3


def test_no_cann_is_said(machine: Machine) -> None:
    printed, changed = machine.source(
        MEGATRON_DEVICE="npu", ASCEND_ROOT=str(machine.dev), HOME=str(machine.dev)
    )
    assert "no set_env.sh found" in printed
    assert "ASCEND_HOME_PATH" not in changed and changed["MEGATRON_NPU_ENVIRONMENT"] == "no-cann"


def test_every_variable_is_named_or_comes_from_cann(machine: Machine) -> None:
    """What changes is printed, or was set by CANN's own file, which is printed."""
    (machine.ascend / "driver" / "lib64").mkdir(parents=True)
    printed, changed = machine.source(MEGATRON_DEVICE="npu")
    silent = {name for name in changed if name not in printed} - {"MEGATRON_NPU_ENVIRONMENT"}
    assert changed.keys() >= {"ASCEND_HOME_PATH", "LD_LIBRARY_PATH"} and not silent, (silent, printed)


def test_an_ordinary_user_is_enough() -> None:
    """Root becomes nobody for it; everything but the shell's environment stays as it was."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        shutil.copy(SCRIPT, root / "env_npu.sh")
        machine = Machine(root)
        before = sorted(root.rglob("*"))
        env = {k: v for k, v in os.environ.items() if not k.startswith(CLEARED)}
        env |= {"MEGATRON_DEVICE": "npu", "DEV_DIR": str(machine.dev), "ASCEND_ROOT": str(machine.ascend)}
        user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(
            ["bash", "-c", f'set -eu; source "{root}/env_npu.sh"; echo "home $ASCEND_HOME_PATH"; id -u'],
            env=env,
            cwd=root,
            text=True,
            capture_output=True,
            check=True,
            **user,
        )
        *_, home, uid = done.stdout.strip().splitlines()
        assert home == f"home {machine.ascend}/ascend-toolkit/latest" and uid != "0" and not done.stderr
        assert sorted(root.rglob("*")) == before
