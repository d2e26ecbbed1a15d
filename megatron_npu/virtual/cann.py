"""Compiles the stand-in for CANN that torch_npu runs over: nine small libraries, by the C compiler alone.

The two with code are in ``cann_sources``; the others only have to exist.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron.core.errors import ConfigError
from megatron_npu import versions

SOURCES = Path(__file__).resolve().parent / "cann_sources"
LIBRARIES = {"ascendcl": "ascendcl.c", "acl_op_compiler": "op_compiler.c"}
EMPTY = ("hccl", "ge_runner", "graph", "acl_tdt_channel", "atb", "msprofiler", "ascend_hal")
# Directories that torch_npu wants to see.
DIRECTORIES = ("runtime", "compiler", "opp")
# The one torch_npu whose calls the libraries answer.
TORCH_NPU = "2.13.0"
_NO_COMPILER = (
    "no C compiler is found, which the stand-in for CANN needs once: install gcc (on Debian and Ubuntu "
    "apt-get install gcc libc6-dev), or name a compiler in CC"
)


def why_not() -> str | None:
    """None if torch_npu can be loaded over the stand-in on this machine, else the reason and a remedy."""
    if not sys.platform.startswith("linux"):
        return f"torch_npu is for Linux, and this is {sys.platform}"
    if importlib.util.find_spec("torch_npu") is None:
        return (
            f"torch_npu is not installed: pip install torch_npu=={TORCH_NPU}, which needs torch {TORCH_NPU} "
            "and Linux on x86_64 or aarch64"
        )
    found = importlib.metadata.version("torch_npu")
    if found != TORCH_NPU:
        return (
            f"torch_npu {found} is installed, and the stand-in for CANN is made for {TORCH_NPU}: "
            f"pip install torch_npu=={TORCH_NPU}"
        )
    mismatch = versions.torch_mismatch(found)
    if mismatch is not None:
        return mismatch
    return None if _directory().is_dir() or _compiler() else _NO_COMPILER


def build() -> Path:
    """Directory with the libraries, made on first use and shared by later runs of this user.

    Raises:
        ConfigError: there is no C compiler, or it fails.
    """
    target = _directory()
    if not target.is_dir():
        _make(target)
    if target.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{target} belongs to another user, and libraries of others are not loaded: remove it, or set "
            "TMPDIR to a directory of your own"
        )
    return target


def _directory() -> Path:
    return Path(tempfile.gettempdir()) / f"megatron-npu-cann-{os.getuid()}-{_digest()}"


@functools.cache
def _digest() -> str:
    """Of what the libraries are made from: another version of it builds its own."""
    sources = [(SOURCES / name).read_text(encoding="utf-8") for name in LIBRARIES.values()]
    return hashlib.sha256("".join([*sources, *EMPTY, *DIRECTORIES]).encode()).hexdigest()[:12]


def _make(target: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise ConfigError(_NO_COMPILER)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}."))
    try:
        for name in DIRECTORIES:
            (work / name).mkdir()
        for library, source in LIBRARIES.items():
            _compile(compiler, work / f"lib{library}.so", str(SOURCES / source))
        for library in EMPTY:
            text = f"int stub_{library}(void) {{ return 0; }}"
            _compile(compiler, work / f"lib{library}.so", "-xc", "-", text=text)
        work.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compiler() -> list[str] | None:
    """The C compiler of this machine, and its first words: $CC, else cc or gcc."""
    named = shlex.split(os.environ.get("CC", ""))
    for words in [named] if named else [["cc"], ["gcc"]]:
        if shutil.which(words[0]) is not None:
            return words
    return None


def _compile(compiler: list[str], library: Path, *source: str, text: str | None = None) -> None:
    command = [*compiler, "-O1", "-w", "-shared", "-fPIC", "-o", str(library), *source]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in said if "error" in line), said[-1] if said else "it says nothing")
        raise ConfigError(
            f"{compiler[0]} cannot compile the stand-in for CANN: {error}; a C compiler with the headers of "
            "the C library is needed (on Debian and Ubuntu apt-get install gcc libc6-dev)"
        )
