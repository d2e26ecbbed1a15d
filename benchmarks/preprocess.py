"""How fast is tools/preprocess_data.py, and how much of its time is the BPE library's own?

    python benchmarks/preprocess.py --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt [--size-mb 100]

The same real text (see real_text.py) goes through the library alone (one thread, from Python strings to
arrays, texts parsed beforehand) and through the whole command (JSON lines on disk to .bin/.idx) with 1 and
with --workers workers, in turn, --rounds times; medians are printed. MB are bytes of UTF-8 text / 1e6; CPU
seconds are those of all processes of a command. "start-up" is the command on one short line: imports and
reading the tokenizer files once per worker, which a large corpus does not notice; "beyond start-up" leaves
it out, as it is left out of the library's figure. The ids are compared by checksum.

--peer DIR runs text through the tools/preprocess_data.py of a Megatron-LM checkout (core_v0.12.1) too; the
megatron-core package of that version holds no such tool.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PEER_MB_PER_CPU_SECOND = 1.35  # Megatron-LM core_v0.12.1, GPT-2 BPE on real text, as reported
BATCH_BYTES = 2 << 20


@dataclass
class Cost:
    """Wall and CPU seconds of one command, all its processes."""

    wall: float
    cpu: float


def main() -> None:
    options = _options()
    if options.library_on:
        _library(options)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        work = Path(directory)
        text_mb = _make_corpus(work, options.size_mb)
        print(f"{text_mb:.1f} MB of text, {os.cpu_count()} cores, medians of {options.rounds} rounds")
        _compare(options, work, text_mb)
        _peer(options, work)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab-file", required=True, help="GPT-2's vocabulary")
    parser.add_argument("--merge-file", required=True, help="GPT-2's merges")
    parser.add_argument("--size-mb", type=float, default=100)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the second command")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="where to put the text and the results for the time of the run")
    parser.add_argument("--peer", help="a Megatron-LM checkout")
    parser.add_argument("--peer-mb", type=float, default=3, help="text for the peer")
    parser.add_argument("--library-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make_corpus(work: Path, size_mb: float) -> float:
    from real_text import documents

    texts = documents(int(size_mb * 1e6))
    with open(work / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (work / "one.jsonl").write_text('{"text": "one line"}\n')
    return sum(len(text.encode()) for text in texts) / 1e6


def _compare(options: argparse.Namespace, work: Path, text_mb: float) -> None:
    crews = dict.fromkeys((1, options.workers))
    library, whole, start = [], {crew: [] for crew in crews}, {crew: [] for crew in crews}
    for _ in range(options.rounds):
        figures = _run_library(options, work)
        library.append(figures["cpu_s"])
        for crew in crews:
            start[crew].append(_tool(ROOT, work / "one.jsonl", work, crew, options))
            whole[crew].append(_tool(ROOT, work / "corpus.jsonl", work, crew, options))
            _check_ids(work / "out_text_document.bin", figures["sha256"])
    bare = text_mb / statistics.median(library)
    print(f"library alone: {bare:.1f} MB per CPU-second; ids of library and command are equal")
    for crew in crews:
        wall = text_mb / statistics.median(cost.wall for cost in whole[crew])
        cpu = statistics.median(cost.cpu for cost in whole[crew])
        idle = statistics.median(cost.cpu for cost in start[crew])
        beyond = text_mb / (cpu - idle)
        print(
            f"command, --workers {crew}: {wall:.1f} MB/s wall, {text_mb / cpu:.1f} MB per CPU-second "
            f"({text_mb / cpu / PEER_MB_PER_CPU_SECOND:.0f} x the peer's {PEER_MB_PER_CPU_SECOND}); "
            f"start-up {idle:.2f} CPU-s; beyond start-up {beyond:.1f} MB per CPU-second, "
            f"{beyond / bare:.0%} of the library alone"
        )


def _run_library(options: argparse.Namespace, work: Path) -> dict:
    command = [
        sys.executable,
        __file__,
        "--library-on",
        str(work / "corpus.jsonl"),
        *_tokenizer_flags(options)[2:],
    ]
    environment = os.environ | {"RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _library(options: argparse.Namespace) -> None:
    """In a process of its own: tokenize a corpus, print CPU seconds and the checksum of the ids."""
    from megatron.training.tokenizer import build_tokenizer

    fixed = {
        "rank": 0,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1,
        "vocab_size": None,
    }
    files = {"vocab_file": options.vocab_file, "merge_file": options.merge_file}
    tokenizer = build_tokenizer(argparse.Namespace(tokenizer_type="GPT2BPETokenizer", **files, **fixed))
    with open(options.library_on, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    batches, held = [[]], 0
    for text in texts:
        if held > BATCH_BYTES:
            batches.append([])
            held = 0
        batches[-1].append(text)
        held += len(text)
    began = time.process_time()
    found = [tokenizer.tokenize_flat(batch)[0] for batch in batches]
    seconds = time.process_time() - began
    digest = hashlib.sha256()
    for ids in found:
        digest.update(ids.astype("<u2").tobytes())
    print(json.dumps({"cpu_s": seconds, "sha256": digest.hexdigest()}))


def _tokenizer_flags(options: argparse.Namespace) -> list[str]:
    files = ["--vocab-file", options.vocab_file, "--merge-file", options.merge_file]
    return ["--tokenizer-type", "GPT2BPETokenizer", *files]


def _tool(root: Path, source: Path, work: Path, workers: int, options: argparse.Namespace) -> Cost:
    paths = ["--input", str(source), "--output-prefix", str(work / "out"), "--workers", str(workers)]
    flags = [*paths, "--log-interval", "100000000", *_tokenizer_flags(options)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "tools/preprocess_data.py", *flags],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{root}/tools/preprocess_data.py failed:\n{done.stderr[-2000:]}")
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _check_ids(path: Path, expected: str) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise SystemExit(f"{path}: these are not the ids of the library")


def _peer(options: argparse.Namespace, work: Path) -> None:
    if not options.peer:
        print("peer: skipped, it needs --peer DIR, a Megatron-LM checkout (the package has no tools)")
        return
    if not (Path(options.peer) / "tools" / "preprocess_data.py").is_file():
        print(f"peer: skipped, there is no tools/preprocess_data.py in {options.peer}")
        return
    text_mb = _make_corpus(work, options.peer_mb)
    costs = {}
    for name, root in (("peer", Path(options.peer)), ("this tool", ROOT)):
        idle = _tool(root, work / "one.jsonl", work, 1, options)
        cost = _tool(root, work / "corpus.jsonl", work, 1, options)
        digest = hashlib.sha256((work / "out_text_document.bin").read_bytes()).hexdigest()
        costs[name] = (text_mb / (cost.cpu - idle.cpu), digest)
    (slow, theirs), (fast, ours) = costs["peer"], costs["this tool"]
    same = "equal" if ours == theirs else "DIFFERENT"
    print(
        f"peer: {slow:.2f} MB per CPU-second beyond start-up on {text_mb:.1f} MB, this tool {fast:.1f}: "
        f"{fast / slow:.0f} x; ids are {same}"
    )


if __name__ == "__main__":
    main()
