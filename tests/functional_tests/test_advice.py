"""What error messages advise is typed, and works."""

import re
import shlex

import pytest

from launcher import pretrain_gpt, tiny_gpt


def advised_flags(output: str) -> list[str]:
    """The words behind "start with:" or "had:" in an error, flag by flag."""
    (advice,) = re.findall(r"(?:start with|saved it had): (.*?)\.(?: |\n)", output)
    return advice.split(", ")


def followed(words: list[str], advice: list[str]) -> list[str]:
    """A command line changed as advised: flags replaced, added, or left out."""
    words = list(words)
    for change in advice:
        flag, *values = shlex.split(change.removeprefix("no "))
        while flag in words:
            start = words.index(flag)
            end = start + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            del words[start:end]
        if not change.startswith("no "):
            words += [flag, *values]
    return words


@pytest.mark.parametrize(
    "other",
    [
        {"num_layers": 3},
        {"hidden_size": 48, "swiglu": True},
        {"normalization": "RMSNorm", "untie_embeddings_and_output_weights": True},
        {"position_embedding_type": "rope", "disable_bias_linear": True},
        {"make_vocab_size_divisible_by": 192},
        {"num_layers": 3, "use_checkpoint_args": True},
    ],
)
def test_the_flags_that_a_checkpoint_asks_for_load_it(golden, tmp_path, other) -> None:
    saved = tiny_gpt(
        golden, tmp_path, train_iters=4, save=tmp_path / "ckpt", save_interval=2, exit_interval=2
    )
    pretrain_gpt(saved, tmp_path).check()
    wrong = tiny_gpt(golden, tmp_path, train_iters=4, load=tmp_path / "ckpt", **other)
    failed = pretrain_gpt(wrong, tmp_path)
    assert failed.status == 1 and failed.output.count("error: ") == 1
    advice = advised_flags(failed.output)
    assert "--use-checkpoint-args" not in advice
    run = pretrain_gpt(followed(wrong, advice), tmp_path)
    assert "successfully loaded checkpoint" in run.check().output


def test_a_path_with_a_blank_is_quoted_as_advised(golden, tmp_path) -> None:
    directory = tmp_path / "my data"
    directory.mkdir()
    for kind in ("bin", "idx"):
        (directory / f"corpus.{kind}").symlink_to(golden / "data" / f"u16_text_document.{kind}")
    words = tiny_gpt(golden, tmp_path, train_iters=1, lr_warmup_iters=0)
    start = words.index("--data-path")
    bare = [*words[: start + 1], *f"{directory}/corpus".split(), *words[start + 2 :]]
    failed = pretrain_gpt(bare, tmp_path)
    assert failed.status == 1
    (advice,) = re.findall(r"quote it: (.*)", failed.output)
    quoted = [*words[:start], *shlex.split(advice), *words[start + 2 :]]
    pretrain_gpt(quoted, tmp_path).check()
