"""What continuous integration uses to try every Python of a machine."""

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from source_tree import ROOT


def script(name: str):
    """A file beside ``.ci/run`` as a module; the directory is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_each_supported_python_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "path/python3", "exit 127")  # a shim of pyenv without a version behind it
    fake(tmp_path / "path/python3.11", f'exec {sys.executable} "$@"')
    fake(tmp_path / "path/python3.12", "echo 3.12.1; echo /opt/python3.12")
    fake(tmp_path / "pyenv/versions/3.9.1/bin/python3", "echo 3.9.1; echo /opt/python3.9")
    fake(tmp_path / "pyenv/versions/3.12.1/bin/python3", "echo 3.12.1; echo /opt/python3.12")
    fake(tmp_path / "pyenv/versions/3.13.0/bin/python3", "echo 3.13.0; echo /opt/python3.13")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    found = script("find_pythons").pythons()
    assert found["/opt/python3.12"] == "3.12.1" and found["/opt/python3.13"] == "3.13.0"
    own = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    assert found[own] == "{}.{}.{}".format(*sys.version_info)
    assert not any(version.startswith("3.9") for version in found.values())


def test_digests_of_checkpoints_tell_bits_apart(tmp_path: Path) -> None:
    weights = torch.tensor([0.0, 1.0])
    for name, content in {
        "a": {"model": {"w": weights}, "iteration": 4},
        "same": {"model": {"w": weights.clone()}, "iteration": 4},
        "sign": {"model": {"w": torch.tensor([-0.0, 1.0])}, "iteration": 4},
        "count": {"model": {"w": weights}, "iteration": 5},
    }.items():
        file = tmp_path / name / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({**content, "args": Namespace(lr=1.0)}, file)
    lines = subprocess.run(
        [sys.executable, ROOT / ".ci" / "checkpoint_digest.py", "a", "same", "sign", "count"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    digests = {line.split()[0]: line.split()[1] for line in lines}
    assert digests["a"] == digests["same"]
    assert len(set(digests.values())) == 3
