"""Data-loading processes hand over their tensors wherever the temporary directory is."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from torch.utils.data import DataLoader
from megatron.training.processes.workers import starting_workers

# Without the sockets no batch comes, and this is then an error instead of a wait without end.
loader = DataLoader([torch.arange(4)] * 3, num_workers=1, timeout=30)
with starting_workers():
    batches = iter(loader)
print(sum(int(batch.sum()) for batch in batches))
"""


def test_a_temporary_directory_with_a_long_name_does_not_stop_the_batches(repo_root, tmp_path) -> None:
    directory = tmp_path / ("long" * 25)
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TMPDIR": str(directory), "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "18\n", done.stderr
    assert not list(directory.iterdir())
