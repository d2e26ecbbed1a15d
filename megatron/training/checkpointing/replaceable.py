"""Functions that user code and its tests replace in the public module, looked up there at every call.

The public module imports the files of this room, so they reach it by name instead of importing it.
"""

import argparse
import sys
from typing import Any


def _public(name: str) -> Any:
    return getattr(sys.modules[__package__], name)


def get_args() -> argparse.Namespace:
    """Arguments of the run."""
    return _public("get_args")()


def check_checkpoint_args(checkpoint_args: argparse.Namespace) -> None:
    """Compare a checkpoint's arguments with those of the run."""
    _public("check_checkpoint_args")(checkpoint_args)


def update_num_microbatches(consumed_samples: int, verbose: bool) -> None:
    """Tell the micro-batch calculator how far the run is."""
    _public("update_num_microbatches")(consumed_samples=consumed_samples, verbose=verbose)
