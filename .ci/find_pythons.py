"""Print every Python of this machine that the package supports, one a line: version, a tab, its path.

Looked at are python3 and python3.N on PATH, the system's own, and those that pyenv keeps. One that is found
under several names, or through a virtual environment, is printed once, by its own path.
"""

import os
import subprocess
from pathlib import Path

OLDEST = (3, 10)
ASK = (
    "import os, sys; print('%d.%d.%d' % sys.version_info[:3]); "
    "print(os.path.realpath(getattr(sys, '_base_executable', sys.executable)))"
)


def candidates() -> list[Path]:
    """Paths that may be interpreters, those of PATH first."""
    directories = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    directories += [Path("/usr/bin"), Path("/usr/local/bin")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    directories += sorted(path / "bin" for path in pyenv.glob("*"))
    names = ["python3", *(f"python3.{minor}" for minor in range(OLDEST[1], OLDEST[1] + 20))]
    return [directory / name for directory in directories for name in names if (directory / name).exists()]


def pythons() -> dict[str, str]:
    """Path of each interpreter -> its version."""
    found = {}
    for path in candidates():
        # Not every file of the name starts: a shim of pyenv may stand for a version that is not selected.
        run = subprocess.run([path, "-c", ASK], capture_output=True, text=True, check=False)
        if run.returncode == 0:
            version, real = run.stdout.split("\n")[:2]
            if tuple(map(int, version.split(".")[:2])) >= OLDEST:
                found[real] = version
    return found


if __name__ == "__main__":
    for path, version in pythons().items():
        print(version, path, sep="\t")
