"""TensorBoard event files of earlier runs, when a run resumes from a checkpoint that is older than they are.

TensorBoard's own remedy, a purge step, drops every point whose x is at or beyond a step. It would drop the
curves over samples altogether, because these count faster than iterations. The files are cut instead.
"""

import os
import struct
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer

# A record is its length (8 bytes), a checksum of that (4), the event, and a checksum of the event (4).
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
# The first point written after an iteration has one of these tags, with the iteration as x.
_FIRST_TAGS = ("learning-rate", "iteration-time")
_FIRST_TAG_ENDS = (" validation", " test", "-time")
_ARGUMENT_TAG_END = "/text_summary"


def set_points_aside(args: Namespace) -> None:
    """Keep TensorBoard from reading twice what this run is about to write again.

    In the event files of ``--tensorboard-dir``, everything from the first point after ``args.iteration`` on
    moves into ``superseded-N-NAME``, which TensorBoard does not read. Nothing is deleted. Does nothing on
    ranks without a writer.
    """
    if get_tensorboard_writer() is None or not os.path.isdir(args.tensorboard_dir):
        return
    cut = [
        name
        for name in sorted(os.listdir(args.tensorboard_dir))
        if "tfevents" in name and _cut(args.tensorboard_dir, name, args.iteration)
    ]
    if cut:
        print(
            f"> {args.tensorboard_dir} held points after iteration {args.iteration}, which this run writes "
            f"again; the older ones of {len(cut)} file(s) are in superseded-* there",
            flush=True,
        )


def _cut(directory: str, name: str, iteration: int) -> bool:
    """Cut one file in front of its first point after ``iteration``; False where it has none."""
    path = os.path.join(directory, name)
    kept_points, first = 0, None
    for offset, event in _events(path):
        if _is_after(event, iteration):
            first = offset
            break
        kept_points += len(event.summary.value)
    if first is None:
        return False
    number = 1
    while os.path.exists(
        aside := os.path.join(directory, f"superseded-{number}-{name}".replace("tfevents", "events"))
    ):
        number += 1
    if kept_points:
        head = os.path.join(directory, f".head-{os.getpid()}")
        with open(path, "rb") as whole, open(head, "wb") as part:
            part.write(whole.read(first))
        os.rename(path, aside)
        os.rename(head, path)
    else:
        os.rename(path, aside)
    return True


def _events(path: str) -> Iterator[tuple[int, Any]]:
    """Offset and content of each event; an incomplete one at the end, of a killed run, is skipped."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    offset, size = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while offset + _HEADER_BYTES <= size:
            (length,) = struct.unpack("<Q", file.read(_HEADER_BYTES)[:8])
            end = offset + _HEADER_BYTES + length + _FOOTER_BYTES
            if end > size:
                return
            try:
                event = Event.FromString(file.read(length))
            except DecodeError:
                return
            yield offset, event
            offset = end
            file.seek(offset)


def _is_after(event: Any, iteration: int) -> bool:
    for value in event.summary.value:
        if value.tag.endswith(_ARGUMENT_TAG_END):
            # A run writes its arguments when it starts, so this one started here before.
            return event.step >= iteration
        if value.tag in _FIRST_TAGS or value.tag.endswith(_FIRST_TAG_ENDS):
            return event.step > iteration
    return False
