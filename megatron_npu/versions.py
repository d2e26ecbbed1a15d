"""Whether torch, torch_npu, CANN and the driver are here and fit each other, said in one sentence each.

``python -m megatron_npu.versions`` says it before torch is imported: launch scripts ask first, because a
torch_npu without CANN ends ``import torch`` with a traceback.
"""

import ctypes
import functools
import glob
import importlib.metadata
import logging
import os
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from megatron.core.errors import ConfigError

logger = logging.getLogger(__name__)

# CANN that each release of torch_npu was built for, as Ascend/pytorch lists them (COMPATIBILITY.en.md).
_BUILT_FOR = {
    "9.1.0": ("2.7.1.post8", "2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0", "2.13.0"),
    "9.0.0": ("2.7.1.post4", "2.8.0.post4", "2.9.0.post2"),
    "8.5.0": ("2.6.0.post5", "2.7.1.post2", "2.8.0.post2", "2.9.0"),
    "8.3.RC1": ("2.6.0.post3", "2.7.1", "2.8.0"),
    "8.2.RC1": ("2.6.0",),
}
_DEVICE_FILES = "/dev/davinci[0-9]*"
_HAS_NPU = "this machine has an NPU"
_DRIVER_LIBRARY = "libascend_hal.so"
_DRIVER_INFO = Path("/usr/local/Ascend/driver/version.info")
# What to do about missing libraries, by what env_npu.sh has found in this shell, where it was sourced.
_LIBRARY_REMEDIES = {
    "": "source tests_gpt/env_npu.sh, or CANN's own set_env.sh, in this shell",
    "no-npu": "tests_gpt/env_npu.sh has found no NPU here and set nothing: give this container its devices "
    "(/dev/davinci*), or set MEGATRON_DEVICE=npu and source it again; MEGATRON_DEVICE=cpu goes without",
    "no-cann": "tests_gpt/env_npu.sh has found no CANN: install it, or set CANN_SET_ENV to its set_env.sh "
    "and source it again; MEGATRON_DEVICE=cpu goes without",
    "cann": "the environment of CANN is read, so the library itself is missing or of another version: "
    "install CANN and the driver that belong to torch_npu; MEGATRON_DEVICE=cpu goes without",
}


@functools.cache
def torch_npu_version() -> str | None:
    """Version of the installed torch_npu; None if there is none. Imports nothing."""
    try:
        return importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def software_problem() -> str | None:
    """Why torch_npu cannot work here, as far as can be told without importing it or torch; or None."""
    version = torch_npu_version()
    if version is None:
        return "torch_npu is not installed: pip install -e '.[npu]' on a machine with Ascend cards"
    mismatch = torch_mismatch(version)
    if mismatch is not None:
        return mismatch
    try:
        ctypes.CDLL("libhccl.so")
    except OSError as error:
        return _without_cann(error)
    return None


@functools.cache
def torch_npu_problem() -> str | None:
    """Why torch_npu cannot be used in this process; None if it is loaded, or could be and now is.

    CANN is looked for before torch_npu is imported: a failed import would leave half of it behind.
    """
    problem = software_problem()
    if problem is None:
        try:
            import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
        except (ImportError, OSError, RuntimeError) as error:
            return _without_cann(error)
    return problem


def _without_cann(error: Exception) -> str:
    """CANN's libraries link to the driver's, which is installed, and goes missing, on its own."""
    missing = "NPU driver" if _DRIVER_LIBRARY in str(error) else "CANN"
    found = os.environ.get("MEGATRON_NPU_ENVIRONMENT", "")
    remedy = _LIBRARY_REMEDIES.get(found, _LIBRARY_REMEDIES[""])
    return f"torch_npu {torch_npu_version()} finds no {missing}: {_first_line(error)}; {remedy}"


def is_wanted() -> bool:
    """Whether this process is to use an NPU; imports neither torch nor torch_npu.

    Raises:
        ConfigError: it is, and software is missing or does not fit.
    """
    asked = _asked_device()
    here = bool(glob.glob(_DEVICE_FILES))
    if not (asked.startswith("npu") or (here and not asked)):
        return False
    problem = software_problem()
    if problem is not None:
        raise ConfigError(f"{_HAS_NPU if here else f'MEGATRON_DEVICE={asked}'}, but {problem}")
    return True


def _asked_device() -> str:
    return os.environ.get("MEGATRON_DEVICE", "").strip().lower()


def why_no_npu() -> str | None:
    """None if this process can compute on an NPU, else why not.

    Raises:
        ConfigError: the machine has an NPU, and its software does not work.
    """
    if _asked_device() == "cpu":
        return "MEGATRON_DEVICE=cpu"
    problem = torch_npu_problem()
    if problem is not None:
        if glob.glob(_DEVICE_FILES):
            raise ConfigError(f"{_HAS_NPU}, but {problem}")
        return problem
    import torch

    available = torch.npu.is_available()  # pyright: ignore[reportAttributeAccessIssue]
    return None if available else f"torch_npu {torch_npu_version()} finds no device"


def require_torch_npu() -> None:
    """Raises ConfigError if torch_npu cannot be used; warns if CANN is older than torch_npu expects."""
    problem = torch_npu_problem()
    if problem is not None:
        raise ConfigError(problem)
    complaint = cann_mismatch(torch_npu_version(), cann_version())
    if complaint is not None:
        logger.warning(complaint)


def cann_mismatch(torch_npu: str | None, cann: str | None) -> str | None:
    """A sentence if ``cann`` is older than what this torch_npu was built for; None also if unknown."""
    wanted = None if torch_npu is None else cann_built_for(torch_npu)
    found = None if cann is None else _parsed(cann)
    if wanted is None or found is None or found >= Version(wanted):
        return None
    return (
        f"torch_npu {torch_npu} was built for CANN {wanted}, CANN {cann} is installed: operators that it "
        "lacks fail when they are called; install the CANN that belongs to torch_npu, or the torch_npu that "
        "belongs to CANN"
    )


def cann_built_for(torch_npu: str) -> str | None:
    """CANN release that a torch_npu version was built for; None for versions before 2.6."""
    version = _parsed(torch_npu)
    if version is None:
        return None
    listed = sorted((Version(name), cann) for cann, names in _BUILT_FOR.items() for name in names)
    older = [(name, cann) for name, cann in listed if name <= version]
    return older[-1][1] if older else None


def cann_version() -> str | None:
    """Version of the CANN in the environment; None if it does not say."""
    loaded = sys.modules.get("torch_npu")
    if loaded is not None:
        asked = loaded.npu.utils.get_cann_version()
        if asked:
            return str(asked)
    home = os.environ.get("ASCEND_HOME_PATH")
    places = ("ascend_*_install.info", "*/ascend_*_install.info", "../ascend_*_install.info")
    files = [file for place in places for file in sorted(Path(home).glob(place))] if home else []
    return _value(files[0], "version") if files else None


def driver_version() -> str | None:
    """Version of the NPU driver; None if there is none in its usual place."""
    return _value(_DRIVER_INFO, "Version")


def torch_mismatch(torch_npu: str) -> str | None:
    """A sentence if the installed torch is not the one that this torch_npu needs. Imports neither."""
    for text in importlib.metadata.requires("torch_npu") or ():
        wanted = Requirement(text)
        installed = importlib.metadata.version("torch")
        found = installed.partition("+")[0]
        if wanted.name == "torch" and not wanted.specifier.contains(found, prereleases=True):
            return (
                f"torch_npu {torch_npu} needs torch{wanted.specifier}, torch {installed} is "
                f"installed: pip install 'torch{wanted.specifier}' (the CPU build), or the torch_npu of "
                f"torch {found}"
            )
    return None


def _value(file: Path, name: str) -> str | None:
    """What stands behind ``name=`` in a file; None without file or line."""
    try:
        found = re.search(rf"^{name}=(.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _parsed(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def main() -> int:
    """Prints what is wrong; 1 if torch_npu cannot work, else 0."""
    problem = software_problem()
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    complaint = cann_mismatch(torch_npu_version(), cann_version())
    if complaint is not None:
        print(f"warning: {complaint}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
