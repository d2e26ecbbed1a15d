"""On a Python that is too old, every entry point names the version that is needed, and nothing else."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What is run before the version has been looked at.
READ_BY_ANY_PYTHON = [
    "setup.py",
    "pretrain_gpt.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.py")),
    "megatron/__init__.py",
    "megatron_npu/__init__.py",
]
ENTRY_POINTS = [
    *(name for name in READ_BY_ANY_PYTHON if not name.endswith("__init__.py")),
    "-m megatron.cli",
    "-m megatron_npu",
    "-m megatron_npu.versions",
    "-m megatron.training.default_data",
]
IMPORTS = [
    "megatron.core",
    "megatron.training",
    "megatron_npu.megatron_adaptor",
    "mindspeed.megatron_adaptor",
    "pretrain_gpt",
]
# Later than Python 2.7: annotations, f-strings, names for values, arguments by keyword only.
NEW_NODES = (ast.AnnAssign, ast.JoinedStr, ast.NamedExpr, ast.Nonlocal, ast.AsyncFunctionDef, ast.YieldFrom)


def old_pythons() -> list[str]:
    """Interpreters of this machine before 3.10, those of pyenv included."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}") for version in ("2.7", "3.6", "3.7", "3.8", "3.9")]
    found += [str(path) for path in pyenv.glob("*/bin/python")]
    is_old = "import sys; sys.exit(sys.version_info >= (3, 10))"
    return [
        path
        for path in found
        if path and not subprocess.run([path, "-c", is_old], capture_output=True).returncode
    ]


@pytest.mark.parametrize("name", READ_BY_ANY_PYTHON)
def test_the_way_to_the_check_can_be_read_by_any_python(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.isascii()
    for node in ast.walk(ast.parse(text, feature_version=(3, 4))):
        assert not isinstance(node, NEW_NODES), ast.unparse(node)
        assert not isinstance(node, ast.FunctionDef) or not node.returns, node.name
        assert not isinstance(node, ast.arguments) or not node.kwonlyargs
        assert not isinstance(node, ast.arg) or not node.annotation, node.arg
        assert not isinstance(node, (ast.List, ast.Tuple)) or not any(
            isinstance(item, ast.Starred) for item in node.elts
        )


@pytest.mark.parametrize("words", [*ENTRY_POINTS, *(f"-c import {name}" for name in IMPORTS)])
def test_an_entry_point_on_a_python_that_calls_itself_old(words: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv and not sys.argv[0].endswith('pip'):\n"
        "    sys.version_info, sys.version = (3, 9, 18, 'final', 0), '3.9.18 (main)'\n"
    )
    command, *rest = words.split(" ", 1)
    run = subprocess.run(
        [sys.executable, command, *rest],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: Python 3.10 or newer is needed, and this is Python 3.9.18")
    assert run.stderr.count("\n") == 1


@pytest.fixture
def path_of_old_pythons(tmp_path: Path) -> Path:
    """A directory whose python3 says that it is Python 3.8, beside what the scripts of a shell need."""
    for tool in ("bash", "sh", "env", "dirname", "readlink", "basename", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    old = tmp_path / "python3"
    old.write_text(
        f"#!/bin/sh\nmark='import sys; sys.version_info, sys.version = (3, 8, 10), \"3.8.10\"; '\n"
        f'if [ "$1" = - ]; then exec {sys.executable} -c "$mark exec(sys.stdin.read())"; fi\n'
        f'exec {sys.executable} -c "$mark $2"\n'
    )
    old.chmod(0o755)
    return tmp_path


def start(script: str, path: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PATH": str(path), "MEGATRON_DEVICE": "cpu", "HOME": str(path)}
    command = ["bash", str(ROOT / script), *words]
    return subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True)


@pytest.mark.parametrize(
    "script",
    ["tests_gpt/pretrain_gpt_distributed_fp16.sh", "tests_gpt/pretrain_gpt_distributed.sh", "tests/test.sh"],
)
def test_a_script_on_an_old_python(script: str, path_of_old_pythons: Path) -> None:
    run = start(script, path_of_old_pythons)
    assert run.returncode == 2 and run.stdout == ""
    assert "Python 3.10 or newer is needed" in run.stderr and "3.8.10" in run.stderr
    assert "set PYTHON" in run.stderr and run.stderr.count("\n") == 1


def test_a_script_takes_a_newer_python_beside_the_old_one(path_of_old_pythons: Path) -> None:
    newer = path_of_old_pythons / "python3.11"
    newer.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    newer.chmod(0o755)
    too_new = path_of_old_pythons / "python3.13"  # has no torch
    too_new.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    too_new.chmod(0o755)
    run = start("tests_gpt/pretrain_gpt_distributed_fp16.sh", path_of_old_pythons, "--mock-data", "--lr", "x")
    assert run.stderr.startswith("error: --lr x: "), run.stderr  # which pretrain_gpt.py itself says
    newer.unlink()
    run = start("tests_gpt/pretrain_gpt_distributed_fp16.sh", path_of_old_pythons)
    assert run.returncode == 2 and "has no torch" in run.stderr


@pytest.mark.skipif(not old_pythons(), reason="no Python older than 3.10 on this machine")
@pytest.mark.parametrize(
    "words",
    ["pretrain_gpt.py", "tools/generate.py", "setup.py", "-m megatron_npu", "-c import megatron.core"],
)
def test_an_entry_point_on_old_pythons(words: str) -> None:
    command, *rest = words.split(" ", 1)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for python in old_pythons():
        run = subprocess.run(
            [python, "-B", command, *rest], cwd=ROOT, env=clean, capture_output=True, text=True
        )
        assert run.returncode == 1 and run.stdout == ""
        assert run.stderr.startswith("error: Python 3.10 or newer is needed, and this is Python ")
        assert run.stderr.count("\n") == 1, run.stderr
