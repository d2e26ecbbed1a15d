"""Making the default data set: corpus, vocabulary and ``.bin/.idx``, built once and kept in a cache."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron.core.errors import ConfigError, DataError
from megatron.training.default_data.corpus import (
    VOCABULARY_SIZE,
    corpus_texts,
    library_modules,
    standard_library,
    train_vocabulary,
    write_corpus,
)
from megatron.training.processes import stop_signals

# Part of the cache key: raise it when the same sources should give other files.
RECIPE_VERSION = 1
# The directory of the package, for a process that is started elsewhere.
_PACKAGES = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class DefaultData:
    """Paths of the finished files."""

    directory: Path

    @property
    def data_path(self) -> Path:
        """Prefix of the ``.bin`` and ``.idx`` files, as ``--data-path`` takes it."""
        return self.directory / "corpus_text_document"

    @property
    def vocab_file(self) -> Path:
        return self.directory / "vocab.json"

    @property
    def merge_file(self) -> Path:
        return self.directory / "merges.txt"


def cache_root() -> Path:
    """``$MEGATRON_CACHE``, else ``$XDG_CACHE_HOME/megatron-npu``, else ``~/.cache/megatron-npu``."""
    if own := os.environ.get("MEGATRON_CACHE"):
        return Path(own).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg) / "megatron-npu"
    try:
        return Path.home() / ".cache" / "megatron-npu"
    except RuntimeError as exc:
        raise ConfigError("this user has no home directory: set MEGATRON_CACHE to a directory") from exc


def ensure_default_data(root: Path | None = None, library: Path | None = None) -> DefaultData:
    """Return the default data set, made first if it is not in the cache.

    Args:
        root: cache directory; default :func:`cache_root`.
        library: directory whose Python sources are the corpus; default the standard library.

    Raises:
        DataError: no sources, or preprocessing failed.
        ConfigError: the cache cannot be written.
    """
    library = library or standard_library()
    modules = library_modules(library)
    directory = (root or cache_root()) / "default-data" / _cache_key(modules)
    try:
        build_once(directory, lambda target: _build(library, modules, target), _say)
    except OSError as exc:
        raise ConfigError(
            f"the default data set cannot be written under {directory.parent}: {exc}. "
            "Set MEGATRON_CACHE to a directory with about 50 MB of room"
        ) from exc
    return DefaultData(directory)


def _cache_key(modules: list[tuple[str, int]]) -> str:
    recipe = {"version": RECIPE_VERSION, "vocabulary": VOCABULARY_SIZE, "modules": modules}
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    return f"python{platform.python_version()}-{digest}"


def _build(library: Path, modules: list[tuple[str, int]], target: Path) -> None:
    started = time.monotonic()
    corpus = target / "corpus.jsonl"
    documents = write_corpus(library, modules, corpus)
    size_mb = corpus.stat().st_size / 1e6
    _say(f"[1/3] corpus: {documents} modules of the Python standard library, {size_mb:.1f} MB")
    _say(f"[2/3] vocabulary: training a byte-level BPE of {VOCABULARY_SIZE} tokens ...")
    tokens = train_vocabulary(corpus_texts(corpus), target)
    _say(f"[3/3] data set: preprocessing with the {tokens} tokens ...")
    _preprocess(corpus, DefaultData(target))
    _say(f"ready after {time.monotonic() - started:.0f} s, kept for the next run")


def _preprocess(corpus: Path, data: DefaultData) -> None:
    flags = {
        "--input": corpus,
        "--output-prefix": data.directory / "corpus",
        "--tokenizer-type": "GPT2BPETokenizer",
        "--vocab-file": data.vocab_file,
        "--merge-file": data.merge_file,
        "--workers": min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1),
    }
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "megatron.cli", "preprocess", *words, "--append-eod"]
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGES), *paths])}
    run = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if run.returncode:
        raise DataError(f"preprocessing failed with exit status {run.returncode}:\n{run.stdout.strip()}")


def _say(line: str) -> None:
    print(f"default data: {line}", file=sys.stderr, flush=True)


MANIFEST = "manifest.json"


def is_complete(directory: Path) -> bool:
    """Whether every file that was there when the directory was finished still has its size."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def build_once(directory: Path, build: Callable[[Path], None], say: Callable[[str], None]) -> bool:
    """Make ``directory`` with ``build(unfinished directory)`` unless it is complete already.

    The build happens in a directory beside it that is renamed at the end, under a file lock: a killed build
    leaves nothing that looks finished, and a second process waits and then finds the directory complete.

    Args:
        directory: the finished directory.
        build: fills the directory it is given; its errors are not caught.
        say: receives progress lines.

    Returns:
        True when this call built it.
    """
    if is_complete(directory):
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_name(directory.name + ".lock"), say):
        if is_complete(directory):
            return False
        if directory.exists():
            say(f"{directory} is incomplete: it is made again")
            shutil.rmtree(directory)
        # This process holds the lock, so the directory was left by a process that died.
        unfinished = directory.with_name(directory.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with stop_signals.unfinished(str(unfinished)):
            unfinished.mkdir()
            build(unfinished)
            _write_manifest(unfinished)
            os.rename(unfinished, directory)
    return True


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in files}
    (directory / MANIFEST).write_text(json.dumps(sizes, indent=1))


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when the process ends, however it ends."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making the same files: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
