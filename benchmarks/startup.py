"""How long a user waits: importing the library, and the first iteration of a tiny run.

Run on an idle machine: python benchmarks/startup.py
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5

TINY_RUN = shlex.split("""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --train-iters 2 --lr 1e-3 --mock-data --eval-iters 0 --log-interval 1
    --tokenizer-type NullTokenizer --vocab-size 4999
""")


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def import_seconds(*modules: str) -> list[float]:
    """Time of each import in turn, in one fresh interpreter whose own start is excluded."""
    code = "import importlib, sys, time\nfor name in sys.argv[1:]:\n"
    code += "    t = time.perf_counter(); importlib.import_module(name); print(time.perf_counter() - t)"
    command = python("-c", code, *modules)
    output = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout
    return [float(line) for line in output.split()]


def first_iteration_seconds() -> tuple[float, float]:
    """Seconds from the command to its first training step, and to the end of a two-step run."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        process = subprocess.Popen(
            python(str(ROOT / "pretrain_gpt.py"), *TINY_RUN),
            env=environment(),
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first, output = None, []
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if first is None and "before the start of training step" in line:
                first = time.perf_counter() - started
        if process.wait() != 0 or first is None:
            raise SystemExit("the tiny run failed:\n" + "".join(output))
        return first, time.perf_counter() - started


def main() -> None:
    imports = [
        import_seconds("torch", "megatron.core", "megatron.core.models.gpt.gpt_model") for _ in range(ROUNDS)
    ]
    torch_s, core_s, gpt_s = (statistics.median(column) for column in zip(*imports, strict=True))
    print(f"import torch            {torch_s:5.2f} s")
    print(f"import megatron.core    {core_s:5.2f} s over torch (limit 0.3 s)")
    print(f"  and its GPT           {gpt_s:5.2f} s more")
    runs = [first_iteration_seconds() for _ in range(3)]
    first, whole = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"first iteration starts {first:5.2f} s after the command (limit 8 s)")
    print(f"two steps end          {whole:5.2f} s after the command")


if __name__ == "__main__":
    main()
