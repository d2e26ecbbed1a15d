"""Which library turns text into GPT-2's ids fastest, and which of them give the same ids?

    python benchmarks/bpe.py --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt [--size-mb 50]

Every library runs in a process of its own, on one thread, on the same real text (see real_text.py), from
Python strings to a flat array of ids. Time is the process's CPU time, threads included. "cold" is the first
--cold-mb of text after building the tokenizer, "all" the whole text from a cold start, "again" the whole
text a second time (a cache has then seen every word). Ids are compared, one by one, with those of
`tokenizers`, on the text and on NASTY below. Libraries that are not installed are left out; so is what only
takes its own built-in vocabularies.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

Flat = tuple[np.ndarray, np.ndarray]
Encode = Callable[[Sequence[str]], Flat]

BATCH = 64  # documents handed over at a time, as the preprocessing tool does

NASTY = [
    "",
    " ",
    "\n",
    "   \n\n  \t x",
    "a" * 5000,
    "ab" * 3000 + " " * 3000 + "x",
    "\n" * 2000,
    " \u00a0\u2003\u3000\u200b\ufeff x",
    "\x00\x01\x02\x1b\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f x",
    "line\r\nline\r\n\r\nline\rline \r\n x",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> c<|endoftext|><|endoftext|>",
    "I'm you're he's it'd we'll they've I'M YOU'RE ''s 's't",
    "été naïve Straße ǅ İ \u0131 ß ﬁ ① ½ ² ٣ ४ \U0001d7d8 Ⅷ",
    "e\u0301 a\u0308\u0301 \u0301x क्षि ไทย ພາສາ 한국어 中文字 日本語テキスト",
    "😀😃 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ❤️ \U0001f9d1\U0001f3fd",
    "\U0010ffff \ue000 \ufffd \ufffe \u2028 \u2029 \u180e",
    "x" + "\u0300" * 1000,
    "0123456789 1,234,567.89 3.14e-10 0xDEADBEEF ___ --- ... !!! ?!",
    "  leading and trailing   ",
    "tab\tseparated\t\tvalues\t",
    "http://example.com/?a=b&c=d#e%20f user@host.tld C:\\path\\to\\file",
    "عربي עברית mixed عربي123abc",
    "中" * 3000,
    "😀" * 1000,
]


def _flat_lists(batch: Sequence[Sequence[int]]) -> Flat:
    lengths = np.array([len(ids) for ids in batch], dtype=np.int64)
    return np.fromiter((i for ids in batch for i in ids), np.int32, int(lengths.sum())), lengths


def _tokenizers(tokenizer_json: str) -> Encode:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> Flat:
        batch = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flat_lists([encoding.ids for encoding in batch])

    return encode


def _tiktoken(tokenizer_json: str) -> Encode:
    import tiktoken

    from megatron.training.tokenizer.gpt2_tokenization import character_to_byte

    to_byte = character_to_byte()
    model = json.loads(tokenizer_json)["model"]
    merged = {left + right for left, right in model["merges"]}
    ranks = {
        bytes(to_byte[character] for character in token): index
        for token, index in model["vocab"].items()
        if token in merged or len(token) == 1
    }
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(texts: Sequence[str]) -> Flat:
        arrays = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate(arrays).astype(np.int32), np.array([len(ids) for ids in arrays])

    return encode


def _fastokens(tokenizer_json: str) -> Encode:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> Flat:
        ids, offsets = tokenizer.encode_batch_flat(list(texts))
        return np.frombuffer(ids, np.int32), np.diff(np.frombuffer(offsets, np.int64))

    return encode


def _gigatoken(tokenizer_json: str) -> Encode:
    import gigatoken  # pyright: ignore[reportMissingImports]

    tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)

    def encode(texts: Sequence[str]) -> Flat:
        layout = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        content = np.asarray(layout.content.data)
        return content[offsets[0] : offsets[-1]].view(np.int32), np.diff(offsets)

    return encode


def _tokie(tokenizer_json: str) -> Encode:
    import tokie  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokenizer.json")
        path.write_text(tokenizer_json, encoding="utf-8")
        tokenizer = tokie.Tokenizer.from_json(str(path))

    def encode(texts: Sequence[str]) -> Flat:
        return _flat_lists([e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)])

    return encode


def _basetenkenizer(tokenizer_json: str) -> Encode:
    import basetenkenizer  # pyright: ignore[reportMissingImports]

    tokenizer = basetenkenizer.Tokenizer.from_json_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> Flat:
        batch = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        arrays = [encoding.into_numpy()["ids"] for encoding in batch]
        return np.concatenate(arrays).astype(np.int32), np.array([len(ids) for ids in arrays])

    return encode


def _kitoken(tokenizer_json: str) -> Encode:
    import kitoken  # pyright: ignore[reportMissingImports]

    tokenizer = kitoken.Kitoken.from_tokenizers(tokenizer_json.encode())
    return lambda texts: _flat_lists(tokenizer.encode_all(list(texts)))


def _iree_tokenizer(tokenizer_json: str) -> Encode:
    from iree.tokenizer import Tokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer.from_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> Flat:
        arrays = [tokenizer.encode_to_array(text) for text in texts]
        return np.concatenate(arrays).astype(np.int32), np.array([len(ids) for ids in arrays])

    return encode


REFERENCE = "tokenizers"
# Name on PyPI: adapter, month of the newest release when this list was last looked at (November 2026).
LIBRARIES: dict[str, tuple[Callable[[str], Encode], str]] = {
    REFERENCE: (_tokenizers, "2026-10"),
    "tiktoken": (_tiktoken, "2026-08"),
    "fastokens": (_fastokens, "2026-10"),
    "gigatoken": (_gigatoken, "2026-07"),
    "tokie": (_tokie, "2026-07"),
    "basetenkenizer": (_basetenkenizer, "2026-07"),
    "kitoken": (_kitoken, "2026-10"),
    "iree-tokenizer": (_iree_tokenizer, "2026-03"),
}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _encode_all(encode: Encode, texts: Sequence[str]) -> list[Flat]:
    return [encode(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]


def measure(library: str, work: Path) -> None:
    """Child process: time one library and leave its ids and figures in ``work``."""
    tokenizer_json = (work / "tokenizer.json").read_text(encoding="utf-8")
    cold, texts = pickle.loads((work / "texts.pickle").read_bytes())
    started = time.perf_counter()
    encode = LIBRARIES[library][0](tokenizer_json)
    figures = {"build_s": time.perf_counter() - started}
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parts, marks = [], [_cpu_seconds()]
    for documents in (texts[:cold], texts[cold:]):
        parts += _encode_all(encode, documents)
        marks.append(_cpu_seconds())
    ids = np.concatenate([part[0] for part in parts])
    lengths = np.concatenate([part[1] for part in parts])
    del parts
    figures["growth_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb
    before = _cpu_seconds()
    _encode_all(encode, texts)
    figures |= {
        "cold_s": marks[1] - marks[0],
        "all_s": marks[2] - marks[0],
        "again_s": _cpu_seconds() - before,
    }
    np.savez(work / f"{library}.npz", ids=ids, lengths=lengths)
    nasty = []
    for text in NASTY:
        try:
            nasty.append(encode([text])[0].tolist())
        except Exception as error:
            nasty.append([str(error)])
    (work / f"{library}.json").write_text(json.dumps({"figures": figures, "nasty": nasty}))


def _difference(library: str, work: Path, texts: Sequence[str]) -> str:
    """'equal', or how far the ids are from the reference's."""
    ours = json.loads((work / f"{library}.json").read_text())["nasty"]
    theirs = json.loads((work / f"{REFERENCE}.json").read_text())["nasty"]
    wrong = [text for text, a, b in zip(NASTY, ours, theirs, strict=True) if a != b]
    with np.load(work / f"{library}.npz") as ours, np.load(work / f"{REFERENCE}.npz") as theirs:
        documents = [
            index
            for index, (a, b) in enumerate(zip(_documents(ours), _documents(theirs), strict=True))
            if not np.array_equal(a, b)
        ]
    text = f"differ in {len(documents)} documents of {len(texts)}" if documents else "equal"
    return text if not wrong else f"{text}; {len(wrong)} hard cases differ: {wrong[0][:16]!r}"


def _documents(result: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The flat ids cut into documents."""
    return np.split(result["ids"], np.cumsum(result["lengths"])[:-1])


def _gpt2_json(vocab_file: str, merge_file: str) -> str:
    from megatron.training.tokenizer.gpt2_tokenization import build_byte_level_bpe, read_byte_level_files

    return build_byte_level_bpe(read_byte_level_files(vocab_file, merge_file)).to_str()


def _prepare(options: argparse.Namespace, work: Path) -> tuple[list[str], int]:
    """Write text and tokenizer for the children; returns the text and the number of cold documents."""
    from real_text import documents

    (work / "tokenizer.json").write_text(_gpt2_json(options.vocab_file, options.merge_file), encoding="utf-8")
    texts = documents(int(options.size_mb * 1e6))
    sizes = np.cumsum([len(text.encode()) for text in texts])
    cold = int(np.searchsorted(sizes, options.cold_mb * 1e6)) + 1
    (work / "texts.pickle").write_bytes(pickle.dumps((cold, texts)))
    return texts, cold


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-file", help="GPT-2's vocabulary (JSON)")
    parser.add_argument("--merge-file", help="GPT-2's merges")
    parser.add_argument("--size-mb", type=float, default=50)
    parser.add_argument("--cold-mb", type=float, default=5)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, help="these libraries, and the reference")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    if not (options.vocab_file and options.merge_file):
        parser.error("give --vocab-file and --merge-file")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        texts, cold = _prepare(options, work)
        _table(
            [REFERENCE, *(options.only or [name for name in LIBRARIES if name != REFERENCE])],
            work,
            texts,
            cold,
        )


def _table(names: Sequence[str], work: Path, texts: Sequence[str], cold: int) -> None:
    total = sum(len(text.encode()) for text in texts) / 1e6
    first = sum(len(text.encode()) for text in texts[:cold]) / 1e6
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    print(
        f"{total:.1f} MB in {len(texts)} documents (sha256 {digest}), cold part {first:.1f} MB; MB "
        f"per CPU-second"
    )
    print(f"{'library':<24}{'newest':>8}{'build s':>8}{'cold':>8}{'all':>8}{'again':>8}{'grows MB':>10}  ids")
    environment = os.environ | {
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    for name in dict.fromkeys(names):
        try:
            label = f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:<24}not installed")
            continue
        command = [sys.executable, __file__, "--measure", name, str(work)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
            print(f"{label:<24}fails: {reason[:90]}")
            continue
        figures = json.loads((work / f"{name}.json").read_text())["figures"]
        speeds = [first / figures["cold_s"], total / figures["all_s"], total / figures["again_s"]]
        columns = "".join(f"{speed:8.1f}" for speed in speeds)
        print(
            f"{label:<24}{LIBRARIES[name][1]:>8}{figures['build_s']:8.2f}{columns}"
            f"{figures['growth_mb']:10.0f}  {_difference(name, work, texts)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
