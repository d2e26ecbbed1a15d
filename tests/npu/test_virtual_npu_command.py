"""``python -m megatron_npu.virtual``: what it prints, its status, and what is said where it cannot work."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron_npu.virtual import cann, environment
from tests.functional_tests.wheel import install_wheel
from tests.npu.ground import on_virtual_npus

OWN_SCRIPT = """
import os
import torch
import torch.distributed as dist

rank = int(os.environ["RANK"])
torch.npu.set_device(rank)
dist.init_process_group("cpu:gloo,npu:hccl")
half = dist.new_group([0, 1])
x = torch.ones(4, device="npu") * rank
dist.all_reduce(x, group=half)
with torch.npu.stream(torch.npu.Stream()):
    assert x.double().sum().item() == 4.0
dist.destroy_process_group()
"""


def test_nothing_is_printed_but_what_a_program_prints(tmp_path: Path) -> None:
    """Allocation, a type that chips lack, and groups of two back ends: each has its own line of C++."""
    (tmp_path / "own.py").write_text(OWN_SCRIPT)
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    quiet = on_virtual_npus("--", *launcher, str(tmp_path / "own.py"))
    assert quiet.returncode == 0 and quiet.stdout == "", quiet.stdout
    told = on_virtual_npus("--", *launcher, str(tmp_path / "own.py"), TORCH_CPP_LOG_LEVEL="WARNING")
    for line in ("NPUCachingAllocator", "Device do not support double dtype", "No backend of type 0"):
        assert line in told.stdout, told.stdout


def test_an_error_ends_with_what_python_says() -> None:
    done = on_virtual_npus("--", "python", "-c", "import torch; torch.ones(1, device='npu'); 1 / 0")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "ERR" not in done.stdout


def test_a_reader_that_leaves_ends_the_writer_quietly() -> None:
    done = on_virtual_npus("--", "bash", "-c", "yes | head -n 1")
    assert (done.returncode, done.stdout) == (0, "y\n")


@pytest.fixture
def refused(tmp_path: Path):
    """Runs the command with variables under which there can be no virtual NPU; returns what it says."""

    def run(**variables: str) -> str:
        (tmp_path / "nothing is built here").mkdir(exist_ok=True)
        variables = {"TMPDIR": str(tmp_path / "nothing is built here"), **variables}
        done = on_virtual_npus("--", "touch", str(tmp_path / "started"), **variables)
        assert done.returncode == 1 and not (tmp_path / "started").exists()
        (line,) = done.stdout.splitlines()
        assert not list((tmp_path / "nothing is built here").iterdir())
        return line

    return run


def test_a_missing_compiler_is_named(refused, tmp_path: Path) -> None:
    said = refused(PATH=str(tmp_path), CC="")
    assert said.startswith("error: no virtual NPU here: no C compiler is found")
    assert "install gcc" in said and "CC" in said
    assert refused(CC="no-such-compiler").startswith("error: no virtual NPU here: no C compiler is found")


def test_a_compiler_that_fails_says_why(refused, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'x.c:1:10: fatal error: stddef.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    said = refused(CC=str(compiler))
    assert "cannot compile the stand-in for CANN: x.c:1:10: fatal error: stddef.h: No such file; " in said
    assert "libc6-dev" in said


def test_a_missing_or_unfit_torch_npu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cann.importlib.metadata, "version", lambda name: "2.9.0")
    monkeypatch.setattr(cann.importlib.util, "find_spec", lambda name: object())
    assert "torch_npu 2.9.0 is installed" in cann.why_not()
    assert cann.why_not().endswith("pip install torch_npu==2.13.0")
    monkeypatch.setattr(cann.importlib.util, "find_spec", lambda name: None)
    assert "pip install torch_npu==2.13.0" in cann.why_not()


def test_libraries_of_another_user_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cann.tempfile, "gettempdir", lambda: str(tmp_path))
    directory = cann._directory()
    directory.mkdir()
    monkeypatch.setattr(cann, "_directory", lambda: directory)
    monkeypatch.setattr(cann.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        cann.build()


def test_status_of_the_command_is_ours() -> None:
    assert on_virtual_npus("--", "python", "-c", "raise SystemExit(7)").returncode == 7
    missing = on_virtual_npus("--", "no-such-command")
    assert missing.returncode == 1 and "error: no-such-command: No such file" in missing.stdout
    none = on_virtual_npus("--devices", "0", "--", "python")
    assert none.returncode == 2 and "at least one is needed" in none.stdout
    unknown = on_virtual_npus("--soc", "foo", "--", "python")
    assert unknown.returncode == 2 and "--soc: invalid choice: 'foo'" in unknown.stdout
    assert "Ascend910A" in unknown.stdout and "Traceback" not in unknown.stdout


TRAIN = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 4095 --train-iters 1
    --lr 1e-3 --eval-iters 0 --num-workers 0 --log-interval 1
"""


def test_a_wheel_brings_virtual_npus(tmp_path: Path) -> None:
    """Its own command starts its own command, in a directory that holds no checkout."""
    install_wheel(tmp_path / "source", tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    command = str(tmp_path / "installed" / "bin" / "megatron-npu")
    done = subprocess.run(
        [command, "virtual", "--devices", "1", "--", command, "train", *TRAIN.split()],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        text=True,
        capture_output=True,
        timeout=600,
    )
    if cann.why_not() is not None:
        assert (done.returncode, done.stderr) == (1, f"error: no virtual NPU here: {cann.why_not()}\n")
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert "> device npu:0 (Ascend910B2), collectives by hccl" in done.stdout
    assert re.search(r"iteration +1/ +1 ", done.stdout)


def test_site_packages_do_not_come_before_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package lies in them, Python finds it anyway."""
    assert environment._search_path().split(os.pathsep)[1:] == [str(environment.ROOT)]
    monkeypatch.setattr(environment.site, "getsitepackages", lambda: [str(environment.ROOT)])
    assert environment._search_path().split(os.pathsep) == [str(environment.HERE / "autoload")]
