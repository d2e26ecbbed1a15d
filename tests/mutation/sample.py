"""Do a room's own tests notice single-point changes of its code? A seeded sample says how many.

    python -m tests.mutation.sample --count 60 --seed 1 --results changes.jsonl

draws 60 changes of ``megatron/core`` (``changes.py``), runs the tests of each change's own room on a copy of
the repository that holds this one change, and prints those that no test noticed. A first run of every room
without changes records which tests evaluate the changed expressions; only these are run, quickest first,
then the rest of their files. The checkout itself is never touched. An interrupted run goes on where it
stopped when given the same results file; ``--again`` tries what an earlier run did not notice on the sources
and tests of today.

mutmut and cosmic-ray were looked at: neither draws a seeded sample, knows tests per directory, or sees what
the ranks of the pool evaluate, and without that each change costs a whole room.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from tests.mutation import evaluations
from tests.mutation.changes import Change, changes_of

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "megatron/core"
UNIT_TESTS = "tests/unit_tests"
# Tests of names that are called from outside only, of every room.
OF_ALL_ROOMS = ("test_private_names.py", "test_private_names_of_data.py")
# Rooms whose tests do not carry their name.
OTHER_ROOMS = {"extensions": ("tensor_parallel", "transformer")}
NOTICED = ("noticed", "no end")
# A changed program may wait for ever; the slowest unchanged room needs less than a minute.
LEAST_LIMIT_S = 120.0


def room_of(path: str) -> tuple[str, ...]:
    """Directories and files with the tests of a source file."""
    package = Path(path).relative_to(SOURCES).parts[0]
    rooms = OTHER_ROOMS.get(package, (package,))
    found = tuple(f"{UNIT_TESTS}/{room}" for room in rooms if (ROOT / UNIT_TESTS / room).is_dir())
    return (found or (f"{UNIT_TESTS}/core",)) + tuple(f"{UNIT_TESTS}/{file}" for file in OF_ALL_ROOMS)


def all_changes(sources: dict[str, str]) -> list[Change]:
    """Every change of the sources, in a fixed order."""
    return [change for path, source in sorted(sources.items()) for change in changes_of(path, source)]


class Copy:
    """A copy of the repository whose files can be changed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            source, target = ROOT / name, self.root / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        self.sources = {
            str(path.relative_to(self.root)): path.read_text() for path in (self.root / SOURCES).rglob("*.py")
        }
        self._temporary = folder / "tmp"
        self._clock = time.time()
        self._running: subprocess.Popen | None = None

    def write(self, path: str, text: str) -> None:
        """Write a file with a time of its own: compiled files are recognised by their seconds."""
        self._clock += 10
        (self.root / path).write_text(text)
        os.utime(self.root / path, (self._clock, self._clock))

    def pytest(self, words: Iterable[str], limit_s: float, **variables: str) -> tuple[int | None, str]:
        """Exit status (None: no end within ``limit_s``) and output of pytest in this copy."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        self._temporary.mkdir(exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": str(self.root), "TMPDIR": str(self._temporary), "OMP_NUM_THREADS": "1",
            "MEGATRON_DEVICE": "cpu", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **variables,
        }  # fmt: skip
        words = ["-p", "tests.mutation.evaluations", *words]
        with open(self._temporary / "output", "w+") as output:
            process = subprocess.Popen(
                [*command, *words], cwd=self.root, env=environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._running = process
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end_session(process)
            output.seek(0)
            text = output.read()
        shutil.rmtree(self._temporary, ignore_errors=True)
        return status, text

    def stop(self) -> None:
        """End what runs in this copy."""
        if self._running is not None:
            _end_session(self._running)


def _end_session(process: subprocess.Popen) -> None:
    """End pytest and whatever it started: the pool's ranks share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Evaluations:
    """Which tests evaluate which change; kept in a file, so that a run that goes on need not ask again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        known = json.loads(file.read_text()) if file.exists() else {"tests": {}, "seconds": {}}
        self._tests: dict[str, list[str]] = known["tests"]
        self.seconds: dict[str, float] = known["seconds"]

    def record(self, rooms: tuple[str, ...], changes: list[Change], copy: Copy, folder: Path) -> None:
        """Run a room's tests once, with every changed expression noting that it is evaluated."""
        if all(change.key in self._tests for change in changes):
            return
        paths = {change.path for change in changes}
        for path in paths:
            expressions = defaultdict(list)
            for number, change in enumerate(changes):
                if change.path == path:
                    expressions[change.start, change.end].append(number)
            copy.write(path, evaluations.with_seen(copy.sources[path], expressions))
        folder.mkdir()
        status, text = copy.pytest(rooms, 1800.0, **{evaluations.FOLDER: str(folder)})
        for path in paths:
            copy.write(path, copy.sources[path])
        if status != 0:
            raise RuntimeError(f"{' '.join(rooms)} must pass without changes\n{text[-3000:]}")
        table = json.loads((folder / "tests.json").read_text())
        found: dict[int, set[str]] = defaultdict(set)
        for line in (folder / "seen").read_text().split("\n")[:-1]:
            number, test = map(int, line.split())
            found[number].add("" if test == evaluations.NO_TEST else table["names"][test])
        self._tests |= {change.key: sorted(found[number]) for number, change in enumerate(changes)}
        self.seconds |= table["seconds"]
        self._file.write_text(json.dumps({"tests": self._tests, "seconds": self.seconds}))

    def order(self, change: Change, rooms: tuple[str, ...]) -> list[str]:
        """Tests that may notice a change: those that evaluate it, then the rest of their files."""
        names = self._tests[change.key]  # "" for what no test evaluates, but an import does
        room = [test for test in self.seconds if test.startswith(rooms)]
        direct = {test for test in room if any(name and test.startswith(name) for name in names)}
        files = {test.split("::")[0] for test in (room if "" in names else direct)}
        stem = Path(change.path).stem
        chosen = [test for test in room if test.split("::")[0] in files]
        return sorted(chosen, key=lambda t: (t not in direct, stem not in t, self.seconds[t]))


def try_change(change: Change, tests: list[str], seconds: dict[str, float], copy: Copy) -> dict:
    """Run ``tests`` on a copy with this change. The result says whether one of them failed."""
    began = time.monotonic()
    outcome, noticed_by = "not evaluated", ""
    if tests:
        copy.write(change.path, change.apply(copy.sources[change.path]))
        chosen = copy.root.parent / "chosen.json"
        chosen.write_text(json.dumps(tests))
        limit_s = LEAST_LIMIT_S + 10 * sum(seconds[test] for test in tests)
        files = sorted({test.split("::")[0] for test in tests})
        try:
            status, text = copy.pytest(["-x", *files], limit_s, **{evaluations.CHOSEN: str(chosen)})
        finally:
            copy.write(change.path, copy.sources[change.path])
        outcome = {0: "not noticed", None: "no end"}.get(status, "noticed")
        failed = [x for x in text.splitlines() if x.startswith(("FAILED", "ERROR"))]
        noticed_by = failed[0][:200] if failed else ""
    return {
        "key": change.key, "path": change.path, "line": change.line, "before": change.before,
        "after": change.after, "outcome": outcome, "by": noticed_by, "tests": len(tests),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def run_sample(changes: list[Change], results: Path, copies: list[Copy], folder: Path) -> None:
    """Try every change, on as many copies as there are, and append what became of it to ``results``."""
    by_room = defaultdict(list)
    for change in changes:
        by_room[room_of(change.path)].append(change)
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)
    record = Evaluations(results.with_suffix(".tests.json"))

    def prepare(rooms: tuple[str, ...]) -> None:
        with _taken(free) as copy:
            record.record(rooms, by_room[rooms], copy, folder / "_".join(rooms).replace("/", "_"))

    def attempt(change: Change) -> None:
        with _taken(free) as copy:
            row = try_change(change, record.order(change, room_of(change.path)), record.seconds, copy)
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['outcome']:14} {row['seconds']:6} s  {_line(row)}", flush=True)

    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            for task, each in ((prepare, list(by_room)), (attempt, changes)):
                for done in as_completed([pool.submit(task, one) for one in each]):
                    done.result()
        except BaseException:  # Ctrl-C, or a room that fails without a change
            pool.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.stop()
            raise


@contextlib.contextmanager
def _taken(free: "SimpleQueue[Copy]") -> Iterator[Copy]:
    copy = free.get()
    try:
        yield copy
    finally:
        free.put(copy)


def _line(row: dict) -> str:
    return f"{row['path']}:{row['line']}: {row['before']!r} -> {row['after']!r}"


def read_results(path: Path) -> dict[str, dict]:
    """The last result of every change in a results file."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["key"]: row for row in rows}


def report(rows: list[dict]) -> None:
    """Print the figure, and what nobody noticed."""
    counts = Counter(row["outcome"] for row in rows)
    noticed = sum(counts[outcome] for outcome in NOTICED)
    print(f"\n{noticed} of {len(rows)} changes were noticed, {counts['no end']} of them by never ending")
    for row in rows:
        if row["outcome"] not in NOTICED:
            print(f"{row['outcome']:14} {_line(row)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=60, help="changes to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, help="file of results, one JSON object a line")
    parser.add_argument("--again", action="store_true", help="try the file's unnoticed changes once more")
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at the same time")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mutation", ignore_cleanup_errors=True) as work:
        copies = [Copy(Path(work) / f"job{number}") for number in range(options.jobs)]
        known = read_results(options.results)
        changes = all_changes(copies[0].sources)
        if options.again:
            missed = {key for key, row in known.items() if row["outcome"] not in NOTICED}
            drawn = todo = [change for change in changes if change.key in missed]
        else:
            drawn = random.Random(options.seed).sample(changes, options.count)
            todo = [change for change in drawn if change.key not in known]
        print(f"{len(changes)} possible changes, {len(drawn)} drawn, {len(todo)} to try", flush=True)
        run_sample(todo, options.results, copies, Path(work))
    known = read_results(options.results)
    report([known[change.key] for change in drawn])


if __name__ == "__main__":
    main()
