"""Continue a text with a trained GPT: ``--load DIR --prompt "def "``.

The model, its precision and its tokenizer are rebuilt from the arguments stored in the checkpoint. Every
flag of pretrain_gpt.py is accepted too, for instance --vocab-file when the tokenizer's files have moved.
"""

import argparse
import io
from contextlib import redirect_stdout
from pathlib import Path

import megatron.core.device_backends  # noqa: F401  (before torch: explains what it cannot load)

# isort: split
import torch

from megatron.cli.pretrain_gpt import model_provider
from megatron.core import accelerator
from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint
from megatron.training.generation import SamplingOptions, generate
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.tokenizer.build import SIZED_BY_FLAG
from megatron.training.training import get_model

# Taken from the checkpoint unless given on the command line; load_args_from_checkpoint takes the rest.
FILLED = (
    "vocab_file", "merge_file", "tokenizer_model", "tokenizer_name_or_path", "tokenizer_type", "vocab_size",
    "pre_tockens", "next_tockens", "window_size",
)  # fmt: skip
# How the weights were used in training, and so how they are used here.
TAKEN = ("fp16", "bf16", "make_vocab_size_divisible_by", "transformer_impl", "vocab_extra_ids")


def add_generation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Flags of this tool."""
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", required=True, help="text to continue")
    group.add_argument("--max-new-tokens", type=int, default=128, help="length of the continuation")
    group.add_argument("--temperature", type=float, default=0.8, help="below 1 the likely tokens gain")
    group.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: all")
    group.add_argument("--top-p", type=float, default=0.95, help="choose among the likeliest tokens up to it")
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    return parser


def check_own_arguments() -> None:
    """``--help``, and what is missing, of this tool alone: a checkpoint knows what else a run needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, help="the directory that training saved to")
    add_generation_arguments(parser).parse_known_args()


def arguments() -> argparse.Namespace:
    """The command line, completed from the checkpoint.

    Raises:
        ConfigError: a tokenizer file that is no longer there.
        CheckpointError: the checkpoint cannot be read.
    """
    args = parse_args(add_generation_arguments)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: a positive number is needed")
    args.exit_on_missing_checkpoint = args.no_load_optim = args.no_load_rng = True
    args.save = args.data_path = args.tensorboard_dir = None
    args.use_checkpoint_args = False  # done here, because more is taken than that flag takes
    args, stored = load_args_from_checkpoint(args)
    assert stored is not None, "a missing checkpoint has ended the run"
    for name in FILLED:
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(stored, name, None))
    for name in TAKEN:
        setattr(args, name, getattr(stored, name, getattr(args, name)))
    args.micro_batch_size = args.global_batch_size = 1
    check_tokenizer_files(args)
    check_vocabulary(args, stored)
    return args


def check_vocabulary(args: argparse.Namespace, stored: argparse.Namespace) -> None:
    """A tokenizer that knows its size from a flag must not take ids that only pad the table for tokens."""
    trained = getattr(stored, "vocab_size", None)
    same_type = args.tokenizer_type == getattr(stored, "tokenizer_type", None)
    if same_type and args.tokenizer_type in SIZED_BY_FLAG and args.vocab_size != trained:
        raise ConfigError(
            f"--vocab-size {args.vocab_size}: the checkpoint was trained with {trained}; leave the flag out"
        )


def check_tokenizer_files(args: argparse.Namespace) -> None:
    """A file that has moved since training is asked for by its flag."""
    for name in ("vocab_file", "merge_file"):
        path = getattr(args, name, None)
        if path and not Path(path).exists():
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"the tokenizer of this checkpoint is {flag} {path}, which is not there: "
                f"give {flag} its place now"
            )


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """The trained model on this machine's device, ready to be called.

    Raises:
        ConfigError: a tokenizer with more ids than the model knows.
    """
    initialize_megatron(parsed_args=args)
    ids = get_tokenizer().vocab_size
    if ids > args.padded_vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids} ids, but the model of this checkpoint {args.padded_vocab_size}: name "
            "the files of the tokenizer it was trained with"
        )
    model = get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    return model[0].eval()


def main() -> None:
    check_own_arguments()
    quiet = io.StringIO()  # only the text goes to stdout
    with redirect_stdout(quiet):
        args = arguments()
        options = SamplingOptions(args.temperature, args.top_k, args.top_p, args.greedy)
        model = load_model(args)
    tokenizer, device = get_tokenizer(), accelerator.current_device()

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)  # [s] -> [1, s]
        return model(tokens, positions, None)

    prompt = tokenizer.tokenize(args.prompt)
    new = generate(
        forward,
        prompt,
        args.max_new_tokens,
        options,
        context_length=args.seq_length,
        vocabulary_size=tokenizer.vocab_size,
        end_token=tokenizer.eod,
        device=device,
        generator=torch.Generator().manual_seed(args.seed),
    )
    print(tokenizer.detokenize(list(prompt) + new))
