"""The wheel of this project, built from the sources at hand and installed in a directory of its own."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def install_wheel(source: Path, target: Path) -> None:
    """Builds a wheel and installs it without the libraries it needs; no network is used.

    Skips the calling test where this environment has nothing to build a wheel with: setuptools does so by
    itself since 70.1.

    Args:
        source: directory for a copy of the sources, in which the wheel is built.
        target: directory to install to; programs are in its ``bin``.
    """
    setuptools = importlib.metadata.version("setuptools")
    if Version(setuptools) < Version("70.1"):
        pytest.skip(f"setuptools {setuptools} builds no wheel by itself: pip install 'setuptools>=70.1'")
    for name in ("megatron", "megatron_npu", "mindspeed"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(source / "dist"), str(source)],
        check=True, capture_output=True, cwd=source,
    )  # fmt: skip
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True, cwd=source)
