"""``megatron-npu COMMAND``: runs every program of this package."""

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.core.package_info import __version__
from megatron.training.entry import run_main
from megatron.training.processes import stop_signals

# For programs with many processes of one thread each: libraries would add threads that compete for the cores.
# Some tokenizers import torch; none needs a device.
_ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}


@dataclass(frozen=True)
class Command:
    """A program.

    Attributes:
        module: whose ``main()`` is run; imported only then.
        summary: what it does, for the list of commands.
        words: arguments put in front of the user's.
        environment: variables to set, unless they are, before large imports.
        when_stopped: end of the line about a signal that arrives before the program describes its own state.
    """

    module: str
    summary: str
    words: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    when_stopped: str = ""


COMMANDS = {
    "train": Command(
        "megatron.cli.pretrain_gpt",
        "pretrain a GPT",
        when_stopped=stop_signals.BEFORE_TRAINING,
    ),
    "preprocess": Command(
        "megatron.training.preprocessing.command",
        "tokenize text into the .bin/.idx files that training reads",
        environment=_ONE_THREAD,
    ),
    "merge": Command(
        "megatron.training.preprocessing.merge",
        "join the .bin/.idx data sets of a directory",
    ),
    "generate": Command("megatron.cli.generate", "continue a text with a trained model"),
    "compare": Command("megatron.cli.compare_runs", "say how far the losses of two runs lie apart"),
    "draw": Command("megatron.cli.draw_schedule", "draw a pipeline schedule"),
    "check": Command(
        "megatron_npu.__main__",
        "compare every replacement of this device with its default",
        words=("check",),
    ),
    "virtual": Command(
        "megatron_npu.virtual.__main__",
        "run a command on virtual NPUs, on a machine that has none",
    ),
}


def run(name: str) -> None:
    """Run a command with the arguments of ``sys.argv``, and exit with its status."""
    command = COMMANDS[name]
    for variable, value in command.environment.items():
        os.environ.setdefault(variable, value)
    sys.argv[1:1] = command.words
    stop_signals.install(command.when_stopped)  # before the imports that take long
    program = importlib.import_module(command.module)

    def to_its_end() -> None:
        status = program.main()
        if status:
            sys.exit(status)

    run_main(to_its_end)


def main() -> int:
    """Run the command that the first argument names; returns the exit status where none is run."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in COMMANDS:
        # The name of the program in its usage text.
        sys.argv[:2] = [f"megatron-npu {word}"]
        run(word)
        return 0
    if word in ("-h", "--help"):
        print(_usage())
        return 0
    if word == "--version":
        print(f"megatron-npu {__version__}")
        return 0
    meant = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f" Did you mean {meant[0]}?" if meant else ""
    print(f"error: megatron-npu has no command {word}.{hint}\n\n{_usage()}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:11} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-npu COMMAND [...]",
            "",
            *lines,
            "",
            "megatron-npu COMMAND --help lists what a command takes. Launchers that start a module, such as",
            "torchrun -m, take megatron.cli COMMAND.",
        ]
    )
