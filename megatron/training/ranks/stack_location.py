"""What a rank is doing, read from the stack of its main thread.

Training records nothing for this, so it costs no time in a step.
"""

import linecache
import os
import re
import sys
import threading
from collections.abc import Iterable
from pathlib import PurePath
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

# Phase of the run by function name; the innermost function on the stack counts. {next} is the iteration in
# progress, {done} the last finished one.
PHASES = {
    "parse_args": "reading its arguments",
    "validate_args": "reading its arguments",
    "load_args_from_checkpoint": "reading arguments from a checkpoint",
    "_join_world": "joining the other ranks",
    "initialize_model_parallel": "making process groups",
    "check_save_directory": "checking the directory to save in",
    "setup_model_and_optimizer": "setting up the model",
    "load_checkpoint": "loading a checkpoint",
    "storage_domain": "finding out which ranks share files",
    "build_train_valid_test_data_iterators": "building the data sets",
    "build_train_valid_test_data_loaders": "building the data sets",
    "build_train_valid_test_datasets": "building the data sets",
    "_load_or_build_index": "building the index of a data set",
    "train": "iteration {next}",
    "train_step": "iteration {next}",
    "evaluate": "an evaluation after iteration {done}",
    "save_checkpoint": "saving a checkpoint after iteration {done}",
    "_leave_process_groups": "ending",
}
# Phases of one rank for which the others wait without a limit.
LONG_PHASES = ("building the index of a data set", "finding out which ranks share files")
_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_COMMUNICATION_ERROR = re.compile(
    r"gloo/transport|gloo::|\bNCCL\b|\bHCCL\b|ProcessGroup|TCPStore|Connection (closed|reset) by peer"
)
_TENSORS = ("tensor", "input", "input_tensor", "output", "output_tensor", "tensor_list", "input_list")
_Frames = list[tuple[FrameType, int]]


class StackLocation(NamedTuple):
    """What a rank is doing.

    Attributes:
        phase: part of the run; "" outside those that are known.
        call: function, and the line that called it.
        waits: whether it is inside a collective or a transfer between ranks.
    """

    phase: str
    call: str
    waits: bool

    def __str__(self) -> str:
        return ", ".join(word for word in (self.phase, self.call) if word) or "the interpreter"


def main_thread_location(iteration: int | None, detail: bool = False) -> StackLocation:
    """What the main thread of this process is doing; see :func:`frames_location`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames: _Frames = []
    while frame is not None:
        frames.append((frame, frame.f_lineno or 0))
        frame = frame.f_back
    return frames_location(frames[::-1], iteration, detail)


def traceback_location(
    traceback: TracebackType | None, iteration: int | None, detail: bool = False
) -> StackLocation:
    """What the program was doing when an error was raised; see :func:`frames_location`."""
    frames: _Frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno or 0))
        traceback = traceback.tb_next
    return frames_location(frames, iteration, detail)


def frames_location(frames: _Frames, iteration: int | None, detail: bool) -> StackLocation:
    """What a stack shows.

    Args:
        frames: (frame, line number), the outermost first.
        iteration: finished iterations when the latest step began, None before training.
        detail: also kinds and sizes of tensors in a collective, which keeps them alive for a while.
    """
    frames, ends = _without_watching(frames)
    if ends:
        return StackLocation("the end of its run", "", False)
    phase = next((PHASES[f.f_code.co_name] for f, _ in reversed(frames) if _is_phase(f)), "")
    # Until the next step begins, ``iteration`` is the number from before the latest one.
    done = 0 if iteration is None else iteration + 1
    phase = phase.format(next=max(done, 1), done=done)
    collective = [(f, n) for f, n in _trailing_in_torch(frames) if f.f_code.co_name != "wrapper"]
    if collective:
        frame = collective[0][0]
        tensors = _tensors(frame.f_locals) if detail else ""
        return StackLocation(
            phase, f"{frame.f_code.co_name}{tensors} at {_caller(frames, collective[0][0])}", True
        )
    if not frames:
        return StackLocation(phase, "", False)
    frame, line = frames[-1]
    # Handles of asynchronous transfers have no frame of their own.
    waits = ".wait(" in linecache.getline(frame.f_code.co_filename, line) and not _in_library(frame)
    return StackLocation(phase, f"{_own_code(frames)}", waits)


def _without_watching(frames: _Frames) -> tuple[_Frames, bool]:
    """Frames outside the package of this module, and whether the run is being ended."""
    for number, (frame, _) in enumerate(frames):
        if _module(frame).startswith(__name__.rpartition(".")[0] + "."):
            return frames[:number], frame.f_code.co_name == "stop"
    return frames, False


def raised_by_communication(error: BaseException) -> bool:
    """Whether an error comes from torch's communication between ranks, and so may be due to another rank."""
    if isinstance(error, dist.DistError):
        return True
    last, traceback = None, error.__traceback__
    while traceback is not None:
        last, traceback = traceback, traceback.tb_next
    # Handles of asynchronous transfers raise without a function of torch's.
    inside = last is not None and _in_torch(last.tb_frame)
    return isinstance(error, RuntimeError) and (inside or bool(_COMMUNICATION_ERROR.search(str(error))))


def _is_phase(frame: FrameType) -> bool:
    return frame.f_code.co_name in PHASES and _module(frame).startswith("megatron.")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _in_torch(frame: FrameType) -> bool:
    return _module(frame).startswith("torch.distributed.")


def _trailing_in_torch(frames: _Frames) -> _Frames:
    """Innermost frames that lie in torch's functions for communication."""
    number = 0
    for frame, _ in reversed(frames):
        if not _in_torch(frame):
            break
        number += 1
    return frames[len(frames) - number :]


def _caller(frames: _Frames, function: FrameType) -> str:
    outer = []
    for frame, line in frames:
        if frame is function:
            break
        outer.append((frame, line))
    return _own_code(outer)


def _own_code(frames: _Frames) -> str:
    """The innermost line that is neither of Python nor of an installed library, and its function."""
    chosen = next(((f, n) for f, n in reversed(frames) if not _in_library(f)), frames[-1] if frames else None)
    if chosen is None:
        return "the interpreter"
    frame, line = chosen
    path = PurePath(frame.f_code.co_filename)
    if _module(frame).startswith("megatron."):
        path = PurePath(*path.parts[-len(_module(frame).split(".")) :])
    else:
        path = PurePath(path.name)
    return f"{path.as_posix()}:{line} ({frame.f_code.co_name})"


def _in_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    for packages in _PACKAGES:
        if packages in name:
            return not name.rpartition(packages)[2].startswith("megatron")
    return name.startswith(("<", _STANDARD_LIBRARY))


def _tensors(local: dict[str, Any]) -> str:
    found: Any = next((local[name] for name in _TENSORS if local.get(name) is not None), None)
    items = found if isinstance(found, (list, tuple)) else [found]
    return f" of {_describe(items)}" if items and all(hasattr(item, "dtype") for item in items) else ""


def _describe(tensors: Iterable[Any]) -> str:
    words = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors]
    return words[0] if len(words) == 1 else f"{len(words)} tensors, the first {words[0]}"
