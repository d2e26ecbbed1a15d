"""Pauses a process in the middle of its imports; see ``tests/functional_tests/pauses.py``."""

import os
import sys
import time
from pathlib import Path


class _PausingFinder:
    """Finds nothing, but takes its time over one name."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            sys.meta_path.remove(self)
            directory = Path(os.environ["PAUSE_DIRECTORY"])
            (directory / "paused").touch()
            while not (directory / "go").exists():
                time.sleep(0.01)


if os.environ.get("PAUSE_AT") == "import" and os.environ.get("RANK") == os.environ.get("PAUSE_RANK"):
    sys.meta_path.insert(0, _PausingFinder())
