"""tools/preprocess_data.py on bad input or a failing machine: one message, a status, no file changed."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "500"]
OLD = {"out_text_document.bin": b"old tokens", "out_text_document.idx": b"old index"}
GOOD = b'{"text": "1 2 3"}\n'


@pytest.fixture
def outputs(tmp_path):
    """A directory with the files of an earlier run, which must stay as they are."""
    directory = tmp_path / "outputs"
    directory.mkdir()
    for name, data in OLD.items():
        (directory / name).write_bytes(data)
    return directory


def command(inputs, outputs, *flags):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    words = ["--input", *inputs, "--output-prefix", outputs / "out", *(flags or NULL)]
    return [sys.executable, str(TOOL), *map(str, words)]


def untouched(outputs):
    assert {path.name: path.read_bytes() for path in outputs.iterdir()} == OLD


def fails(words, outputs, *expected, status=1, **options):
    """The command ends with the status and one message that has every expected part."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert len(re.findall(r"^(?:\S+: )?error: ", done.stderr, re.MULTILINE)) == 1, done.stderr
    for part in expected:
        assert str(part) in done.stderr, f"{part!r} is missing from: {done.stderr}"
    untouched(outputs)


# name of the file, its content, parts of the message
RECORDS = {
    "missing key": (
        "in.jsonl",
        GOOD + b'{"body": "x", "id": 3}\n',
        ["in.jsonl:2:", "key 'text'", "'body', 'id'", "--json-keys"],
    ),
    "null": ("in.jsonl", GOOD + b'{"text": null}\n', ["in.jsonl:2:", "'text' is null"]),
    "number": ("in.jsonl", GOOD * 2 + b'{"text": 12.5}\n', ["in.jsonl:3:", "'text' is a number (12.5)"]),
    "boolean": ("in.jsonl", b'{"text": true}\n', ["in.jsonl:1:", "'text' is a boolean (True)"]),
    "object": ("in.jsonl", b'{"text": {"a": 1}}\n', ["in.jsonl:1:", "'text' is an object"]),
    "number in list": ("in.jsonl", GOOD + b'{"text": ["1", 2]}\n', ["in.jsonl:2:", "item 1", "a number (2)"]),
    "blank line": ("in.jsonl", GOOD + b"\n" + GOOD, ["in.jsonl:2:", "blank", "sed -i"]),
    "line of blanks": ("in.jsonl", GOOD + b" \t\r\n" + GOOD, ["in.jsonl:2:", "blank"]),
    "blank last line": ("in.jsonl", GOOD + b"\n", ["in.jsonl:2:", "blank"]),
    "lone surrogate": (
        "in.jsonl",
        GOOD + rb'{"text": "1 \ud800"}',
        ["in.jsonl:2:", "'text'", r"\ud800", "U+FFFD"],
    ),
    "surrogates reversed": ("in.jsonl", rb'{"text": ["1", "\ude00\ud83d"]}', ["in.jsonl:1:", r"\ude00"]),
    "invalid JSON": (
        "in.jsonl",
        GOOD + b'{"text": "1 2 3", oops}\n',
        ["in.jsonl:2:", "invalid JSON", "oops"],
    ),
    "cut JSON": ("in.jsonl", GOOD + b'{"text": "1 2', ["in.jsonl:2:", "invalid JSON", "1 2"]),
    "two records": ("in.jsonl", GOOD.strip() + GOOD, ["in.jsonl:1:", "invalid JSON"]),
    "invalid UTF-8": (
        "in.jsonl",
        GOOD + b'{"text": "1 \xff"}\n',
        ["in.jsonl:2:", "UTF-8", "byte 12", "0xff"],
    ),
    "UTF-8 of a surrogate": ("in.jsonl", b'{"text": "\xed\xa0\x80"}\n', ["in.jsonl:1:", "UTF-8", "byte 10"]),
    "an array": ("in.jsonl", b'[{"text": "1"}]\n', ["in.jsonl:1:", "found a list", ".json"]),
    "a string": ("in.jsonl", GOOD + b'"text"\n', ["in.jsonl:2:", "found a string"]),
    "text the tokenizer refuses": (
        "in.jsonl",
        GOOD + b'{"text": "1 two"}\n',
        ["in.jsonl:2:", "tokenizer", "two"],
    ),
    "id beyond the dtype": ("in.jsonl", GOOD + b'{"text": "1 70000 2"}\n', ["in.jsonl:2:", "70000"]),
    "empty file": ("in.jsonl", b"", ["in.jsonl", "empty"]),
    "byte order mark alone": ("in.jsonl", b"\xef\xbb\xbf", ["in.jsonl", "no document"]),
    "empty in gzip": ("in.jsonl.gz", gzip.compress(b""), ["in.jsonl.gz", "no document"]),
    "empty array": ("in.json", b"[]", ["in.json", "no document"]),
    "cut gzip": ("in.jsonl.gz", gzip.compress(GOOD * 999)[:-12], ["in.jsonl.gz", "cut short"]),
    "not gzip": ("in.jsonl.gz", GOOD, ["in.jsonl.gz", "not a sound gzip"]),
    "not zstd": ("in.jsonl.zst", GOOD * 9, ["in.jsonl.zst", "not a sound zstd"]),
    "error in gzip": (
        "in.jsonl.gz",
        gzip.compress(GOOD * 5 + b"{}\n"),
        ["in.jsonl.gz:6:", "keys here: none"],
    ),
    "error in array": ("in.json", b'[{"text": "1"},\n {"txt": "2"}]', ["in.json: element 2:", "'txt'"]),
    "array not closed": (
        "in.json",
        b'[{"text": "1"}\n',
        ["in.json: element 2 (line 2)", "expected a comma or ]"],
    ),
    "array of numbers": ("in.json", b'[{"text": "1"}, 5]', ["in.json: element 2", "expected a JSON object"]),
    "comma at the end": ("in.json", b'[{"text": "1"}, ]', ["in.json", "comma"]),
    "text behind array": ("in.json", b'[{"text": "1"}] x', ["in.json", "more text"]),
    "broken element": (
        "in.json",
        b'[\n{"text": "1"},\n{"text": 1 2}\n]',
        ["in.json: element 2 (line 3)", "invalid"],
    ),
    "UTF-8 in array": ("in.json", b'[{"text": "1"},\n{"text": "\xff"}]', ["in.json", "UTF-8", "byte 26"]),
    "not parquet": ("in.parquet", GOOD, ["in.parquet", "parquet"]),
}


@pytest.mark.parametrize("case", RECORDS)
def test_bad_content_is_named_with_its_position(tmp_path, outputs, case):
    name, content, expected = RECORDS[case]
    (tmp_path / name).write_bytes(content)
    workers = 1 if len(case) % 2 else 2  # half of the cases in each mode
    fails(command(tmp_path / name, outputs, *NULL, "--workers", workers), outputs, *expected)


def test_the_first_bad_line_is_named_for_any_number_of_workers(tmp_path, outputs):
    lines = [GOOD.strip()] * 40_000
    lines[39_000] = b"{}"
    lines[20_123] = b'{"text": 5}'
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    fails(command(tmp_path / "in.jsonl", outputs, *NULL, "--workers", 4), outputs, "in.jsonl:20124:")


def test_a_bad_line_before_a_truncation_is_named_first(tmp_path, outputs):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(GOOD * 1000)
    (tmp_path / "cut.zst").write_bytes(data[:-2])
    fails(command(tmp_path / "cut.zst", outputs), outputs, "cut.zst", "cut short")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ({"text": ["1", None]}, ["in.parquet: row 2:", "null"]),
        ({"text": [1, 2]}, ["in.parquet: row 1:", "a number (1)"]),
        ({"body": ["1"]}, ["no column 'text'", "body"]),
        ({"text": []}, ["no rows"]),
    ],
)
def test_bad_parquet_is_named(tmp_path, outputs, column, expected):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(column), tmp_path / "in.parquet")
    fails(command(tmp_path / "in.parquet", outputs), outputs, *expected)


FLAGS = {
    "workers and partitions": (
        [*NULL, "--workers", "3", "--partitions", "2"],
        ["--workers 3", "--workers 4"],
    ),
    "handler": ([*NULL, "--handler-name", "AlpacaPretrainHandler"], ["AlpacaPretrainHandler", "leave"]),
    "lazy": ([*NULL, "--dataset-impl", "lazy"], ["--dataset-impl lazy", "mmap"]),
    "no tokenizer": (["--workers", "1"], ["--tokenizer-type"]),
    "no vocabulary": (
        ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "gone.json", "--merge-file", "gone.txt"],
        ["gone.json", "--vocab-file"],
    ),
    "two problems": (
        [*NULL, "--dataset-impl", "lazy", "--handler-name", "X"],
        ["--dataset-impl", "--handler-name"],
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_are_named(tmp_path, outputs, case):
    flags, expected = FLAGS[case]
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    fails(command(tmp_path / "in.jsonl", outputs, *flags), outputs, *expected)


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--wrokers", "1"], ["--log-interval", "x"]])
def test_usage_errors_exit_with_status_2(tmp_path, outputs, flags):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    fails(command(tmp_path / "in.jsonl", outputs, *NULL, *flags), outputs, flags[0], status=2)


def test_missing_inputs_are_named(tmp_path, outputs):
    fails(command(tmp_path / "gone.jsonl", outputs), outputs, "gone.jsonl", "no such file")
    fails(command(tmp_path / "*.jsonl", outputs), outputs, "no file matches")
    fails(command(outputs, outputs), outputs, "is a directory", "/*.jsonl")


def test_unusable_output_directories_are_named(tmp_path, outputs):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    source = tmp_path / "in.jsonl"
    fails(command(source, tmp_path / "gone"), outputs, "no directory", f"mkdir -p {tmp_path / 'gone'}")
    fails(command(source, Path("/proc")), outputs, "/proc cannot be written")
    assert not (tmp_path / "gone").exists()


def test_sentence_splitting_without_a_model_names_the_download(tmp_path, outputs):
    pytest.importorskip("nltk")
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    flags = [*NULL, "--split-sentences", "--lang", "klingon"]
    fails(
        command(tmp_path / "in.jsonl", outputs, *flags), outputs, "--lang klingon", "punkt_tab", "NLTK_DATA"
    )


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("flags", [["--workers", "1"], ["--workers", "2", "--partitions", "2"]])
def test_a_file_size_limit_leaves_outputs_unchanged(tmp_path, outputs, flags):
    (tmp_path / "in.jsonl").write_bytes(GOOD * 100_000)
    words = command(tmp_path / "in.jsonl", outputs, *NULL, *flags)
    fails(words, outputs, "bytes of tokens", str(outputs), "No output file was", preexec_fn=limit_file_size)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip(
            "mounting a small file system is not permitted here; the file size limit stands in for it"
        )
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_outputs_unchanged(tmp_path, small_disk):
    for name, data in OLD.items():
        (small_disk / name).write_bytes(data)
    (tmp_path / "in.jsonl").write_bytes(GOOD * 100_000)
    words = command(tmp_path / "in.jsonl", small_disk, *NULL, "--workers", 2)
    fails(words, small_disk, "No space left on device", "bytes of tokens")


class Feed:
    """The tool, reading from a pipe: it waits for us wherever a test needs it to."""

    def __init__(self, tmp_path, outputs, workers):
        self.pipe = tmp_path / "in.jsonl"
        os.mkfifo(self.pipe)
        words = command(self.pipe, outputs, *NULL, "--workers", workers)
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while "Opening" not in (line := self.process.stdout.readline()):
            assert line, self.process.stderr.read()

    def workers(self):
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]

    def write_in_background(self, data):
        def write():
            try:
                with open(self.pipe, "wb") as pipe:
                    pipe.write(data)
            except BrokenPipeError:
                pass

        threading.Thread(target=write, daemon=True).start()

    def end(self):
        """Standard error, once the tool has ended."""
        return self.process.communicate(timeout=300)[1]


def gone(pids):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_reported(tmp_path, outputs, number):
    feed = Feed(tmp_path, outputs, workers=3)
    workers = feed.workers()
    victim = workers[1]
    os.kill(victim, signal.SIGSTOP)  # so that the run cannot be over before the signal comes
    feed.write_in_background(GOOD * 2_000_000)
    time.sleep(1)
    assert feed.process.poll() is None
    os.kill(victim, number)
    os.kill(victim, signal.SIGCONT)
    errors = feed.end()
    assert feed.process.returncode == 1
    assert re.search(
        rf"error: worker 1 \(process {victim}\) was killed by signal {int(number)} \({number.name}\)", errors
    )
    assert ("out of memory" in errors) == (number == signal.SIGKILL)
    assert "Traceback" not in errors
    untouched(outputs)
    assert gone(workers)


@pytest.mark.parametrize(
    ("number", "workers", "whole_group"),
    [
        (signal.SIGINT, 2, True),
        (signal.SIGTERM, 2, False),
        (signal.SIGTERM, 2, True),
        (signal.SIGUSR1, 2, True),
        (signal.SIGINT, 1, True),
    ],
)
def test_a_signal_leaves_outputs_unchanged(tmp_path, outputs, number, workers, whole_group):
    feed = Feed(tmp_path, outputs, workers)
    children = feed.workers()
    os.killpg(feed.process.pid, number) if whole_group else feed.process.send_signal(number)
    errors = feed.end()
    assert feed.process.returncode == 128 + number
    assert errors.endswith(f"error: stopped by {number.name} before any output file was made or changed\n")
    assert "Traceback" not in errors
    untouched(outputs)
    assert gone(children)


def test_killed_coordinator_leaves_no_worker_and_no_result(tmp_path, outputs):
    feed = Feed(tmp_path, outputs, workers=2)
    children = feed.workers()
    feed.process.kill()
    feed.end()
    assert gone(children)
    for name, data in OLD.items():
        assert (outputs / name).read_bytes() == data
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    done = subprocess.run(
        command(tmp_path / "good.jsonl", outputs), capture_output=True, text=True, check=True
    )
    assert "left of a killed run" in done.stderr
    assert (outputs / "out_text_document.bin").read_bytes() == b"\1\0\2\0\3\0"


def test_a_failure_leaves_the_output_directory_empty(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"{}\n")
    (tmp_path / "results").mkdir()
    done = subprocess.run(
        command(tmp_path / "in.jsonl", tmp_path / "results"), capture_output=True, check=False
    )
    assert done.returncode == 1
    assert list((tmp_path / "results").iterdir()) == []


def test_unusual_valid_records_are_accepted(tmp_path, outputs):
    """Accepted as Megatron accepts them: NaN elsewhere, a key twice, huge numbers, a whole surrogate pair."""
    records = [
        b'{"score": NaN, "text": "1"}',
        b'{"text": "9", "text": "2"}',
        b'{"n": 123456789012345678901234567890, "text": "3"}',
        rb'{"other": "\ud800", "text": "4"}',
        b' {"text": "5", "inf": -Infinity} \r',
        json.dumps({"title": "\U0001f600", "text": "6"}).encode(),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(records))
    subprocess.run(command(tmp_path / "in.jsonl", outputs), capture_output=True, check=True)
    assert (outputs / "out_text_document.bin").read_bytes() == b"\1\0\2\0\3\0\4\0\5\0\6\0"
