"""A torch_npu that does not work: ignored without an NPU, one sentence with one, never a traceback.

The package is installed in a directory and fails as the real one does without CANN; where the real one is
installed, it is tried too.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron_npu import versions
from tests.npu.ground import ROOT

TRAIN = [
    "--num-layers",
    "1",
    "--hidden-size",
    "16",
    "--num-attention-heads",
    "2",
    "--seq-length",
    "16",
    "--max-position-embeddings",
    "16",
    "--micro-batch-size",
    "1",
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "4095",
    "--train-iters",
    "1",
    "--lr",
    "1e-3",
    "--log-interval",
    "1",
    "--eval-iters",
    "0",
    "--num-workers",
    "0",
]
# A machine that has a card, as far as one can see.
WITH_A_CARD = """
import runpy, sys
import megatron_npu.versions
megatron_npu.versions._DEVICE_FILES = "/dev/null"
sys.argv = sys.argv[1:]
sys.path.insert(0, "tools")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NO_CANN = "finds no CANN: libhccl.so"
pytestmark = pytest.mark.skipif(Path("/dev/davinci0").exists(), reason="this machine has an NPU")


@pytest.fixture
def made_up(tmp_path: Path) -> list[str]:
    """Directories for PYTHONPATH below which torch would load a torch_npu that does not work."""
    info = tmp_path / "torch_npu-2.99.0.dist-info"
    info.mkdir()
    wanted = torch.__version__.partition("+")[0]
    (info / "METADATA").write_text(f"Name: torch_npu\nVersion: 2.99.0\nRequires-Dist: torch=={wanted}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (tmp_path / "torch_npu.py").write_text('raise ImportError("libhccl.so: cannot open shared object file")')
    return [str(tmp_path)]


@pytest.fixture(params=["made up", "real"])
def torch_npu(request: pytest.FixtureRequest) -> list[str]:
    """As ``made_up``, and the real one."""
    if request.param == "made up":
        return request.getfixturevalue("made_up")
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed: pip install -e '.[npu-test]' (Linux, x86_64 or aarch64)")
    return []


def python(paths: list[str], *words: str, **more: str) -> subprocess.CompletedProcess:
    """``python WORDS`` in a shell that sets none of our variables."""
    dropped = ("STUB_NPU", "TORCH_DEVICE_BACKEND", "MEGATRON_DEVICE", "LD_LIBRARY_PATH", "ASCEND_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    env |= {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([sys.executable, *words], env=env, cwd=ROOT, text=True, capture_output=True)


def test_torch_alone_would_end_in_a_traceback(made_up: list[str]) -> None:
    done = python(made_up, "-c", "import torch")
    assert done.returncode == 1 and "Failed to load the backend extension: torch_npu" in done.stderr


@pytest.mark.parametrize("variables", [{}, {"MEGATRON_DEVICE": "cpu"}], ids=["no card", "a card, and cpu"])
def test_a_machine_without_npu_trains_on_its_cpu(torch_npu: list[str], variables: dict[str, str]) -> None:
    script = ("-c", WITH_A_CARD, "pretrain_gpt.py") if variables else ("pretrain_gpt.py",)
    done = python(torch_npu, *script, *TRAIN, **variables)
    assert done.returncode == 0, done.stderr
    assert "iteration        1/       1" in done.stdout and "CANN" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    done = python([], "pretrain_gpt.py", *TRAIN, "--save", str(directory), "--save-interval", "1")
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "tools/generate.py"])
def test_a_card_without_cann_is_one_sentence(torch_npu: list[str], script: str, checkpoint: Path) -> None:
    words = TRAIN if script == "pretrain_gpt.py" else ("--load", str(checkpoint), "--prompt", "1 2")
    done = python(torch_npu, "-c", WITH_A_CARD, script, *words)
    assert done.returncode == 1, done.stdout
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: this machine has an NPU, but torch_npu") and NO_CANN in said
    assert said.endswith("MEGATRON_DEVICE=cpu goes on without it") and "Traceback" not in done.stderr


def test_asking_for_an_npu_by_name_is_answered(made_up: list[str]) -> None:
    done = python(made_up, "pretrain_gpt.py", *TRAIN, MEGATRON_DEVICE="npu")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: MEGATRON_DEVICE=npu, but torch_npu")
    assert NO_CANN in done.stderr and "Traceback" not in done.stderr


def test_the_adaptor_before_torch_lets_torch_be_imported(made_up: list[str]) -> None:
    code = "import megatron_npu.megatron_adaptor, torch; print(torch.ones(1).item())"
    done = python(made_up, "-c", code)
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr
    assert done.stderr.startswith("megatron_npu: nothing is replaced, torch_npu") and NO_CANN in done.stderr


@pytest.mark.parametrize("script", ["preprocess_data", "merge_datasets", "draw_schedule", "compare_runs"])
def test_other_tools_start_without_an_npu(made_up: list[str], script: str) -> None:
    assert python(made_up, f"tools/{script}.py", "--help").returncode == 0


def test_a_switched_off_loading_stays_off_and_children_see_what_was_set(made_up: list[str]) -> None:
    code = (
        "import os, sys; from megatron.core import accelerator, device_backends\n"
        "print(accelerator.device_type(), device_backends.PROBLEMS, 'torch_npu' in sys.modules, "
        "os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'))"
    )
    assert python(made_up, "-c", code).stdout == "cpu {} False 0\n"
    off = python(made_up, "-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert off.stdout == "cpu {} False 0\n", off.stderr


def test_back_ends_of_others_load_as_torch_loads_them(tmp_path: Path) -> None:
    for name, body in (
        ("torch_fine", "def go():\n    print('loaded')\n"),
        ("torch_broken", "import nothing_\n"),
    ):
        (tmp_path / f"{name}.py").write_text(body)
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {name}:go\n")
    # Away from the project, where a real torch_npu has its companion: only these two are looked at.
    code = (
        "import importlib.metadata as m; every = m.entry_points\n"
        "m.entry_points = lambda group: [e for e in every(group=group) if e.value.endswith(':go')]\n"
        "from megatron.core import accelerator\n"
        "try:\n    accelerator.device_type()\nexcept ValueError as error:\n    print(error)"
    )
    done = python([str(tmp_path)], "-c", code)
    assert done.stdout.splitlines() == [
        "loaded",
        "torch cannot load its back end torch_broken: No module named 'nothing_'. "
        "MEGATRON_DEVICE=cpu goes on without it",
    ], done.stderr


def test_npu_is_wanted_where_its_device_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_DEVICE", raising=False)
    monkeypatch.setattr(versions, "software_problem", lambda: None)
    assert not versions.is_wanted()
    monkeypatch.setattr(versions, "_DEVICE_FILES", "/dev/null")
    assert versions.is_wanted()
    monkeypatch.setenv("MEGATRON_DEVICE", "cpu")
    assert not versions.is_wanted()
    monkeypatch.setattr(versions, "software_problem", lambda: "something is wrong")
    monkeypatch.setenv("MEGATRON_DEVICE", "npu")
    with pytest.raises(ConfigError, match="this machine has an NPU, but something is wrong"):
        versions.is_wanted()
