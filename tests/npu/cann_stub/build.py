"""Compiles the stand-in for CANN that torch_npu runs over: nine small libraries, by the C compiler alone.

The two with code are ``ascendcl.c`` and ``op_compiler.c``; the others only have to exist.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = {"ascendcl": "ascendcl.c", "acl_op_compiler": "op_compiler.c"}
WHEEL = "2.13.0"
EMPTY = ("hccl", "ge_runner", "graph", "acl_tdt_channel", "atb", "msprofiler", "ascend_hal")


def compiler() -> str | None:
    """A C compiler of this machine ($CC, cc or gcc); None if there is none."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def why_not() -> str | None:
    """None if torch_npu can be loaded over the stand-in on this machine, else the reason and a remedy."""
    if not sys.platform.startswith("linux"):
        return f"torch_npu is for Linux, this is {sys.platform}"
    if importlib.util.find_spec("torch_npu") is None:
        return f"torch_npu {WHEEL} is not installed: pip install -e '.[npu-test]' (Linux, x86_64 or aarch64)"
    found = importlib.metadata.version("torch_npu")
    if found != WHEEL:
        return f"torch_npu {found} is installed, the stand-in for CANN is made for {WHEEL}"
    return None if compiler() is not None else "no C compiler: install cc or gcc, or set CC"


def build() -> Path:
    """Directory with the libraries, made on first use and shared by later runs of this user."""
    text = "".join([*((HERE / name).read_text(encoding="utf-8") for name in SOURCES.values()), *EMPTY])
    name = f"megatron-npu-cann-{os.getuid()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    target = Path(tempfile.gettempdir()) / name
    if target.is_dir():
        return target
    work = Path(tempfile.mkdtemp(prefix=f"{name}."))
    for library, source in SOURCES.items():
        _compile(work / f"lib{library}.so", str(HERE / source))
    for library in EMPTY:
        _compile(work / f"lib{library}.so", "-xc", "-", text=f"int stub_{library}(void) {{ return 0; }}")
    try:
        work.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return target


def _compile(library: Path, *source: str, text: str | None = None) -> None:
    command = [compiler(), "-O1", "-w", "-shared", "-fPIC", "-o", str(library), *source]
    subprocess.run(command, input=text, text=True, check=True)
