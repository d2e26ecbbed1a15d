"""Print digests of checkpoint directories, of the state and of the arguments in each: DIR STATE ARGUMENTS.

Equal digests are equal bits: of every tensor and array, of every other value its representation.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

from megatron.training.checkpointing.safe_load import load_file


def lines(value, place: str = ""):
    """One line for each value in a structure, with its place."""
    if isinstance(value, dict):
        for key in value:
            yield from lines(value[key], f"{place}/{key}")
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for index, item in enumerate(value):
            yield from lines(item, f"{place}/{index}")
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield f"{place} {value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, np.ndarray):
        yield f"{place} {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    else:
        yield f"{place} {value!r}"


def digest(value) -> str:
    return hashlib.sha256("\n".join(lines(value)).encode()).hexdigest()[:16]


if __name__ == "__main__":
    for directory in sys.argv[1:]:
        (file,) = Path(directory).glob("iter_*/mp_rank_00/model_optim_rng.pt")
        state = load_file(str(file))
        print(directory, digest({k: v for k, v in state.items() if k != "args"}), digest(vars(state["args"])))
