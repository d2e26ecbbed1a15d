"""Real text that is on the machine already, for benchmarks: code, manuals, documentation, translations.

The mixture is by bytes and the order fixed by a seed, so that two runs on one machine see the same text.
Other machines have other files: compare ratios between machines, never absolute figures.
"""

import gettext
import gzip
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

LARGEST_DOCUMENT = 200_000  # characters; longer files are cut
SMALLEST_DOCUMENT = 200
LARGEST_FILE = 20_000_000  # bytes; longer ones are data, not text


def documents(size: int, seed: int = 1234) -> list[str]:
    """About ``size`` bytes of UTF-8 in documents, mixed by ``SHARES``.

    Raises:
        SystemExit: this machine does not hold that much text.
    """
    found: list[str] = []
    for number, (kind, (share, source)) in enumerate(SHARES.items()):
        texts = _take(source(random.Random(seed + number)), int(size * share))
        have = sum(len(text.encode()) for text in texts)
        print(f"{kind:>14}: {have / 1e6:6.1f} MB in {len(texts)} documents", file=sys.stderr)
        found += texts
    total = sum(len(text.encode()) for text in found)
    if total < 0.9 * size:
        missing = _take(_python_sources(random.Random(seed + 99)), size - total)
        found = list(dict.fromkeys(found + missing))
        total = sum(len(text.encode()) for text in found)
    if total < 0.9 * size:
        raise SystemExit(f"this machine has only {total / 1e6:.1f} MB of the text wanted; ask for less")
    random.Random(seed).shuffle(found)
    return found


def _take(texts: Iterator[str], size: int) -> list[str]:
    """Texts up to ``size`` bytes, each one once."""
    taken, seen, total = [], set(), 0
    for text in texts:
        text = text[:LARGEST_DOCUMENT]
        if len(text) < SMALLEST_DOCUMENT or text in seen:
            continue
        seen.add(text)
        taken.append(text)
        total += len(text.encode())
        if total >= size:
            break
    return taken


def _files(roots: list[str], suffixes: tuple[str, ...], rng: random.Random) -> Iterator[Path]:
    paths = sorted(path for root in roots for path in Path(root).rglob("*") if path.name.endswith(suffixes))
    rng.shuffle(paths)
    for path in paths:
        try:
            if path.is_file() and path.stat().st_size <= LARGEST_FILE:
                yield path
        except OSError:
            continue


def _read(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield raw.decode("utf-8")
        except (OSError, UnicodeDecodeError, EOFError):
            continue


def _python_sources(rng: random.Random) -> Iterator[str]:
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    return _read(_files(roots, (".py", ".pyi", ".md", ".rst"), rng))


def _documentation(rng: random.Random) -> Iterator[str]:
    roots = ["/usr/share/doc", "/usr/share/perl", "/usr/share/info", "/usr/share/common-licenses"]
    return _read(_files(roots, (".txt", ".pod", ".md", ".html", ".gz", "README", "NEWS"), rng))


def _manuals(rng: random.Random) -> Iterator[str]:
    return _read(_files(["/usr/share/man"], (".gz",), rng))


def _translations(rng: random.Random) -> Iterator[str]:
    """Messages of installed programs in all languages: each catalogue is a document."""
    for path in _files(["/usr/share/locale", "/usr/share/vim"], (".mo",), rng):
        try:
            with path.open("rb") as stream:
                catalogue = cast(Any, gettext.GNUTranslations(stream))._catalog
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        yield "\n".join(text for text in catalogue.values() if isinstance(text, str))


SHARES = {
    "documentation": (0.45, _documentation),
    "manual pages": (0.05, _manuals),
    "Python sources": (0.3, _python_sources),
    "translations": (0.2, _translations),
}
