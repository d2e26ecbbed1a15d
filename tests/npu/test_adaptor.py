"""One line turns everything on where there is an NPU, and touches nothing where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_npu import activation, versions
from megatron_npu.registry import replacements
from tests.npu import ground

PROBE = """
import torch
before = set(dir(torch)), torch.nn.Module.to, torch.optim.AdamW.step
import megatron_npu.megatron_adaptor
from megatron.core import overrides
overrides.import_all_points()
active = sum(row.active for row in overrides.table())
assert active or (before == (set(dir(torch)), torch.nn.Module.to, torch.optim.AdamW.step))
print("active", active)
"""
activation.declare_all()
# Of a 910B: all but the flags of a chip that saturates.
ACTIVE = sum("npu_get_float_status" not in each.operators for each in replacements().values())
NPU_HERE = Path("/dev/davinci0").exists()


def plain(*words: str, **more: str) -> subprocess.CompletedProcess:
    """``python WORDS`` as on a machine without CANN."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("STUB_NPU")}
    env |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "LD_LIBRARY_PATH": "", "MEGATRON_DEVICE": "", **more}
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, [more.get("PYTHONPATH")]), str(ground.ROOT)])
    return subprocess.run([sys.executable, *words], env=env, cwd=ground.ROOT, text=True, capture_output=True)


@pytest.fixture
def installed(tmp_path: Path):
    """A directory in which a torch_npu for some torch is installed; its import fails as without CANN."""

    def make(wanted: str) -> str:
        info = tmp_path / "torch_npu-2.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: torch_npu\nVersion: 2.1.0\nRequires-Dist: torch=={wanted}\n")
        (tmp_path / "torch_npu.py").write_text(
            'raise ImportError("libhccl.so: cannot open shared object file")\n'
        )
        return str(tmp_path)

    return make


@pytest.mark.skipif(NPU_HERE, reason="this machine has an NPU")
def test_a_machine_without_npu_is_left_alone_in_one_line() -> None:
    done = plain("-c", PROBE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "active 0\n"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("megatron_npu: nothing is replaced, torch_npu"), lines


@pytest.mark.skipif(NPU_HERE, reason="this machine has an NPU")
def test_the_table_says_why_nothing_is_active() -> None:
    done = plain("-m", "megatron_npu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no NPU in use: torch_npu")
    assert done.stdout.rstrip().splitlines()[-1].startswith("0 of ")
    check = plain("-m", "megatron_npu", "check")
    assert check.returncode == 2
    assert check.stderr.startswith("error: nothing to compare, torch_npu") and "Traceback" not in check.stderr


@pytest.mark.skipif(NPU_HERE, reason="this machine has an NPU")
def test_the_table_needs_no_variable_where_torch_would_load_the_package_itself(installed) -> None:
    """With an installed torch_npu and no CANN, ``import torch`` by itself ends in a traceback."""
    path = Path(installed(torch.__version__.partition("+")[0]))
    entry = path / "torch_npu-2.1.0.dist-info" / "entry_points.txt"
    entry.write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    plainly = plain("-c", "import torch", PYTHONPATH=str(path), TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert plainly.returncode == 1 and "Traceback" in plainly.stderr
    env = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    env |= {"PYTHONPATH": os.pathsep.join([str(path), str(ground.ROOT)]), "LD_LIBRARY_PATH": ""}
    command = [sys.executable, "-m", "megatron_npu"]
    done = subprocess.run(command, env=env, cwd=ground.ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no NPU in use: torch_npu 2.1.0 finds no CANN")


@pytest.mark.skipif(NPU_HERE, reason="this machine has an NPU")
def test_missing_cann_is_one_sentence(installed) -> None:
    path = installed(torch.__version__.partition("+")[0])
    done = plain("-c", PROBE, PYTHONPATH=path)
    assert done.returncode == 0 and "active 0" in done.stdout
    assert "torch_npu 2.1.0 finds no CANN: libhccl.so" in done.stderr and "env_npu.sh" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("found", ["no-npu", "no-cann", "cann"])
def test_a_sourced_environment_is_not_recommended_as_it_was(installed, monkeypatch, found: str) -> None:
    """Whoever has sourced env_npu.sh is told what it lacked, not to do the same again."""
    monkeypatch.setattr(versions, "torch_npu_version", lambda: "2.13.0")
    monkeypatch.setattr(versions, "torch_mismatch", lambda version: None)
    monkeypatch.setenv("MEGATRON_NPU_ENVIRONMENT", found)
    said = versions._without_cann(OSError("libhccl.so: cannot open shared object file"))
    first = {"no-npu": "MEGATRON_DEVICE=npu", "no-cann": "CANN_SET_ENV", "cann": "install CANN"}[found]
    assert first in said.partition("source it again")[0] and "or CANN's own set_env.sh" not in said


def test_launchers_are_told_before_torch_is_imported(installed) -> None:
    done = plain("-X", "importtime", "-m", "megatron_npu.versions", PYTHONPATH=installed("2.1.*"))
    assert done.returncode == 1
    assert "error: torch_npu 2.1.0 needs torch==2.1.*" in done.stderr
    assert "| torch\n" not in done.stderr and "| megatron_npu\n" in done.stderr


def test_a_missing_driver_is_not_called_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    """CANN is there, and links to a library that comes with the driver."""

    def load(name: str) -> None:
        raise OSError("libascend_hal.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(versions, "torch_npu_version", lambda: "2.13.0")
    monkeypatch.setattr(versions, "torch_mismatch", lambda version: None)
    monkeypatch.setattr(versions.ctypes, "CDLL", load)
    said = versions.software_problem.__wrapped__()
    assert said.startswith("torch_npu 2.13.0 finds no NPU driver: libascend_hal.so: cannot open")
    assert "env_npu.sh" in said and "CANN:" not in said


def test_another_torch_is_one_sentence(installed) -> None:
    done = plain("-m", "megatron_npu", PYTHONPATH=installed("2.1.*"))
    assert "torch_npu 2.1.0 needs torch==2.1.*" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("torch_npu", "cann", "complains"),
    [
        ("2.7.1.post2", "8.5.0", False),
        ("2.7.1.post2", "8.3.RC1", True),
        ("2.7.1", "8.3.RC1", False),
        ("2.7.1", "9.0.0", False),
        ("2.8.0.post9", "8.5.0", True),  # later than the last listed: at least what that one wants
        ("2.13.0", "8.5.0", True),
        ("2.13.0", "9.1.0", False),
        ("2.13.0", None, False),
        ("2.13.0", "an odd string", False),
        ("2.1.0", "5.0", False),  # before the versions that this project supports
    ],
)
def test_an_older_cann_is_named(torch_npu: str, cann: str | None, complains: bool) -> None:
    sentence = versions.cann_mismatch(torch_npu, cann)
    assert (sentence is not None) == complains
    if complains:
        assert (
            f"torch_npu {torch_npu} was built for CANN" in sentence
            and f"CANN {cann} is installed" in sentence
        )


def test_cann_tells_its_version_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x86_64-linux").mkdir()
    info = tmp_path / "x86_64-linux" / "ascend_toolkit_install.info"
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert versions.cann_version() == "8.5.0"


def test_one_line_activates_everything() -> None:
    done = ground.run("-c", PROBE)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == f"active {ACTIVE}"


def test_the_product_needs_no_line() -> None:
    done = ground.run(
        "-c",
        "import torch, torch_npu\nfrom megatron.core import accelerator, overrides\n"
        "overrides.load(accelerator.device_type()); overrides.import_all_points()\n"
        "print('active', sum(row.active for row in overrides.table()))",
    )
    assert done.stdout.splitlines()[-1] == f"active {ACTIVE}", done.stdout


def test_the_table_of_a_910a_and_a_disabled_name() -> None:
    done = ground.run("-m", "megatron_npu", soc="Ascend910A", MEGATRON_DISABLE_OVERRIDES="rotary")
    rows = {line.split()[0].rpartition(".")[2]: line for line in done.stdout.splitlines() if "." in line}
    assert "SoC 102, saturation mode" in done.stdout
    assert rows["fused_attention"].endswith("SoC 102: the operator is for 910B, 910_93, 950")
    assert rows["rotary"].endswith("disabled by name")
    assert rows["unscale_and_check"].endswith("active")
    assert "F.dropout" in rows["dropout"]


def test_the_check_command_fails_beyond_a_bound() -> None:
    """The whole command, on CPU tensors with emulated kernels; then with one replacement made wrong."""
    code = (
        "import sys, torch; from megatron_npu.virtual.kernels import all_kernels\n"
        "if sys.argv[1] == 'wrong':\n"
        "    kernels = all_kernels(); right = kernels['npu_swiglu']\n"
        "    kernels['npu_swiglu'] = lambda *a: right(*a) * 1.01\n"
        "from tests.npu.cpu_kernels import install_on_cpu; install_on_cpu()\n"
        "import megatron_npu; megatron_npu.activate()\n"
        "from megatron_npu.checking import compare\n"
        "sys.exit(compare.main(torch.device('cpu'), ['swiglu', 'rms_norm'], ['float32', 'bfloat16']))"
    )
    good = ground.run("-c", code, "right", MEGATRON_DEVICE="cpu")
    assert good.returncode == 0 and "4 of 4 comparisons within" in good.stdout, good.stdout
    bad = ground.run("-c", code, "wrong", MEGATRON_DEVICE="cpu")
    assert bad.returncode == 1 and bad.stdout.count("BEYOND THE BOUND") == 1, bad.stdout
