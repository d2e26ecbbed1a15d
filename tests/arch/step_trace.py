"""Traces the second training step of the smallest model, in a process of its own, and tells how it got where.

    python tests/arch/step_trace.py [CHECKOUT]          print the paths
    python tests/arch/step_trace.py --write             write docs/one_step.md of this checkout

A path is the stack of the project's functions from one of them to another; frames of torch and of the
standard library do not count.
"""

import argparse
import ast
import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PAGE = "docs/one_step.md"
FLAGS = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 256 --max-position-embeddings 256 "
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 0.001 --mock-data --tokenizer-type "
    "NullTokenizer --vocab-size 4095 --log-interval 1 --eval-iters 0 --num-workers 0 --transformer-impl local"
)
SECONDS = 300
# Functions of torch that make the update, by the names that C calls them.
ADAM_KERNELS = ("_fused_adamw_", "_foreach_addcdiv_")
WRITE = f"python tests/arch/step_trace.py --write writes {PAGE} anew"


@dataclass(frozen=True)
class Stop:
    """One function of the project on a path."""

    file: str
    """Below the root of the checkout."""
    function: str
    """With its class: ``MegatronOptimizer.step``."""
    meaning: str
    """First sentence of its docstring; empty without one."""


@dataclass(frozen=True)
class StepTrace:
    """What one step passed through."""

    paths: dict[str, list[Stop]]
    """Name of a path -> its functions, both ends included."""
    files: list[str]
    """Files whose functions ran in the step, in order of the first call."""


# Name of a path -> (heading of its section on the page, what the section says before the stops).
SECTIONS = {
    "loop": (
        "From the command to the step",
        "`pretrain` builds everything once; `train` calls `train_step` until the run is over.",
    ),
    "forward": (
        "From the step to the model",
        "The schedule runs forward and backward of one micro-batch after another. The entry script fetches "
        "the batch and calls the model.",
    ),
    "loss": (
        "From the step to the loss",
        "The entry script gave the schedule a function for the loss together with the model's output.",
    ),
    "backward": (
        "From the step to autograd's backward",
        "Autograd hands each parameter's gradient to a hook of the wrapper, which adds it into a buffer.",
    ),
    "accumulate": (
        "From backward to the gradient buffer",
        "The hook runs inside backward, once for each parameter and micro-batch.",
    ),
    "finalize": (
        "From the last backward to the reduced gradients",
        "With more ranks this is where gradients are summed over them; one rank has nothing to add. "
        "[param_and_grad_buffer.py](../megatron/core/distributed/param_and_grad_buffer.py) `_reduce` sends "
        "them: the whole bucket or, with the distributed optimizer, each rank's slice. "
        "The gradient of a weight that is split over tensor-parallel ranks is whole on its rank, and is "
        "summed over data-parallel ranks only.",
    ),
    "update": (
        "From the step to the Adam kernel",
        "The optimizer checks and clips the gradients first, then updates all parameters of a group at once. "
        "With `--use-distributed-optimizer`, "
        "[distrib_optimizer.py](../megatron/core/optimizer/distrib_optimizer.py) comes between: it hands the "
        "kernel this rank's slices in fp32, and gathers the updated parameters.",
    ),
    "log": (
        "From the loop to the log line",
        "The loop hands what the step returned to the log, which prints a line every `--log-interval` steps.",
    ),
}


def trace(root: Path) -> StepTrace:
    """Runs the smallest model of a checkout and returns what its second step passed through.

    Raises:
        RuntimeError: the run failed; the text has its output.
    """
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "trace.json"
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(found), str(root), *FLAGS.split()],
            cwd=directory,
            env=environment
            | {
                "PYTHONPATH": str(root),
                "MEGATRON_DEVICE": "cpu",
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        if done.returncode or not found.exists():
            raise RuntimeError(f"the traced run ended with status {done.returncode}:\n{done.stdout}")
        seen = json.loads(found.read_text())
    paths = {name: [Stop(*stop) for stop in stops] for name, stops in seen["paths"].items()}
    return StepTrace({name: paths[name] for name in SECTIONS if name in paths}, seen["files"])


# --- in the traced process ----------------------------------------------------------------------------------


class _Recorder:
    """Profile function of one step: keeps the stack when something that is looked for is called.

    Args:
        root: of the checkout.
    """

    def __init__(self, root: Path):
        self._prefix = f"{root}{os.sep}"
        # A virtual environment may lie in the checkout.
        self._libraries = tuple(
            {f"{sysconfig.get_path(name)}{os.sep}" for name in ("purelib", "platlib", "stdlib")}
        )
        self.paths: dict[str, list[Stop]] = {}
        self.files: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, called: object) -> None:
        if event == "c_call":
            name = getattr(called, "__name__", "")
            if name == "run_backward":
                self.keep("backward", frame)
            elif name in ADAM_KERNELS:
                self.keep("update", frame)
        elif event == "call" and self._is_ours(frame.f_code.co_filename):
            self.files[frame.f_code.co_filename.removeprefix(self._prefix)] = None
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            if name == "forward" and file.endswith("gpt_model.py"):
                self.keep("forward", frame)
            elif name == "loss_func" and "pretrain_gpt" in file:
                self.keep("loss", frame)
            elif name == "_add_to_main_grad":
                self.keep("accumulate", frame, start="backward_step")
            elif name == "finish_grad_sync" and file.endswith("distributed_data_parallel.py"):
                self.keep("finalize", frame)

    def _is_ours(self, file: str) -> bool:
        return file.startswith(self._prefix) and not file.startswith(self._libraries)

    def keep(self, name: str, frame: FrameType | None, start: str = "train_step") -> None:
        """Keep the project's functions from ``start`` to ``frame``, unless the path is known."""
        if name in self.paths:
            return
        stops = []
        while frame is not None:
            code = frame.f_code
            is_ours = self._is_ours(code.co_filename) and code.co_filename != __file__
            # Comprehensions are functions to some versions of Python.
            if is_ours and not code.co_name.startswith("<"):
                stops.append(_describe(frame, self._prefix))
                if frame.f_code.co_name == start:
                    self.paths[name] = stops[::-1]
                    return
            frame = frame.f_back


def _describe(frame: FrameType, prefix: str) -> Stop:
    """The function of a frame; its docstring, or that of the method it stands in for."""
    code = frame.f_code
    name, text = _names(code.co_filename).get(code.co_firstlineno, (code.co_name, None))
    if not text and "self" in frame.f_locals:
        classes = type(frame.f_locals["self"]).__mro__
        texts = (getattr(vars(base).get(code.co_name), "__doc__", None) for base in classes)
        text = next((text for text in texts if text), None)
    return Stop(code.co_filename.removeprefix(prefix), name, _first_sentence(text or ""))


@functools.cache
def _names(file: str) -> dict[int, tuple[str, str | None]]:
    """First line of each function, decorators included -> (name with its class, docstring)."""
    found: dict[int, tuple[str, str | None]] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{outer}.{child.name}" if outer else child.name
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(word.lineno for word in child.decorator_list)])
                    found[first] = (name, ast.get_docstring(child))
            visit(child, name)

    visit(ast.parse(Path(file).read_text(encoding="utf-8")), "")
    return found


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


def _run_traced(found: Path, root: Path, flags: list[str]) -> None:
    """Train two steps with ``flags``; write what the second passed through to ``found``."""
    import builtins

    import pretrain_gpt
    from megatron.training import training

    recorder, real_step, real_print = _Recorder(root), training.train_step, builtins.print
    steps = 0

    def print_and_keep(*words: object, **settings: object) -> None:
        if steps == 2 and any("lm loss" in str(word) for word in words):
            recorder.keep("log", sys._getframe(1), start="train")
        real_print(*words, **settings)

    @functools.wraps(real_step)
    def train_step(*args: object, **settings: object) -> object:
        nonlocal steps
        steps += 1
        if steps != 2:
            return real_step(*args, **settings)

        def profile(frame: FrameType, event: str, called: object) -> None:
            if frame.f_code is real_step.__code__ and event == "call":
                recorder.keep("loop", frame, start="main")
            recorder(frame, event, called)

        sys.setprofile(profile)
        try:
            return real_step(*args, **settings)
        finally:
            sys.setprofile(None)

    training.train_step, builtins.print = train_step, print_and_keep
    sys.argv = ["pretrain_gpt.py", *flags]
    pretrain_gpt.main()
    paths = {
        name: [(stop.file, stop.function, stop.meaning) for stop in stops]
        for name, stops in recorder.paths.items()
    }
    found.write_text(json.dumps({"paths": paths, "files": list(recorder.files)}))


# --- printing -----------------------------------------------------------------------------------------------


def length(stops: list[Stop]) -> str:
    """Length of a path in words."""
    return f"{len(stops)} functions in {len({stop.file for stop in stops})} files"


def page(step: StepTrace) -> str:
    """The text of docs/one_step.md."""
    lines = [
        "# One step of training",
        "",
        "Where one training step of the smallest GPT goes: one device, one pipeline stage, fp32, two "
        "micro-batches.",
        "Each list is a real call stack, from the caller down: file, function, and what the function does, "
        "in the words of",
        "its docstring. Functions of torch between them are left out, and so is the part of a stack that an "
        "earlier list shows.",
        "",
        f"This page is generated: `{WRITE.split(' writes ', maxsplit=1)[0]}` traces a step and writes it.",
    ]
    shown: list[list[Stop]] = []
    for name, stops in step.paths.items():
        title, text = SECTIONS[name]
        first = max((_num_shared(stops, earlier) for earlier in shown), default=0)
        first = max(first - 1, 0)
        lines += ["", f"## {title}", "", f"{text} In all {length(stops)}.", ""]
        for number, stop in enumerate(stops[first:], first + 1):
            meaning = f": {_as_markdown(stop.meaning)}" if stop.meaning else ""
            lines.append(f"{number}. [{stop.file}](../{stop.file}) `{stop.function}`{meaning}")
        shown.append(stops)
    return "\n".join(lines) + "\n"


def _num_shared(stops: list[Stop], others: list[Stop]) -> int:
    """How many functions two paths have in common before they part."""
    pairs = enumerate(zip(stops, others, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(stops), len(others)))


def _as_markdown(text: str) -> str:
    """Names in a docstring's markup as Markdown writes them."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def _report(step: StepTrace) -> str:
    lines = []
    for name, stops in step.paths.items():
        lines.append(f"{SECTIONS[name][0]}: {length(stops)}")
        lines += [f"    {stop.file}: {stop.function}" for stop in stops]
    return "\n".join([*lines, f"files in one step: {len(step.files)}"])


def main() -> None:
    """See the top of this file."""
    if sys.argv[1:2] == ["--child"]:
        _run_traced(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    own = Path(__file__).resolve().parents[2]
    parser.add_argument("checkout", nargs="?", type=Path, default=own)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} of this checkout")
    arguments = parser.parse_args()
    step = trace(arguments.checkout.resolve())
    print(_report(step))
    if arguments.write:
        (own / PAGE).write_text(page(step), encoding="utf-8")


if __name__ == "__main__":
    main()
