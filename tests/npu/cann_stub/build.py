"""Compiles the stand-in for CANN: nine small libraries, by the C compiler alone.

The two with code are ``ascendcl.c`` and ``op_compiler.c``; the others only have to exist.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = {"ascendcl": "ascendcl.c", "acl_op_compiler": "op_compiler.c"}
EMPTY = ("hccl", "ge_runner", "graph", "acl_tdt_channel", "atb", "msprofiler", "ascend_hal")


def compiler() -> str | None:
    """A C compiler of this machine ($CC, cc or gcc); None if there is none."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


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
