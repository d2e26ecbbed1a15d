"""Progress lines: one for each multiple of the interval, with rates and what is left."""

import re

import pytest

from megatron.training.preprocessing import command as module
from megatron.training.preprocessing.command import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_progress_lines_give_rates_and_time_left(clock, capsys):
    progress = Progress(10, total_bytes=4_000_000)
    clock[0] += 2
    progress.advance(9, size_bytes=1 << 20, bytes_read=500_000)
    assert capsys.readouterr().err == ""
    clock[0] += 2
    progress.advance(31, size_bytes=3 << 20, bytes_read=1_000_000)
    # 40 documents and 4 MiB in 4 s; a quarter is read, so three times 4 s are left
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"Processed {count} documents (10.0 docs/s, 1.0 MB/s). 25% done, 0:00:12 left"
        for count in (10, 20, 30, 40)
    ]


def test_progress_of_a_pipe_gives_no_time_left(clock, capsys):
    progress = Progress(1, total_bytes=0)
    clock[0] += 1
    progress.advance(1, 100, 100)
    assert re.fullmatch(r"Processed 1 documents \(\S+ docs/s, \S+ MB/s\)\.\n", capsys.readouterr().err)
