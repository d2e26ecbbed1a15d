"""What a run with experts prints and writes: losses in the log line, and how tokens were spread."""

import math
import re
from argparse import Namespace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.core.transformer.moe import tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.logging import expert_log
from megatron.training.logging.expert_log import STARVING_LINES, LoadLog
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import train

EXPERTS, LAYERS = 4, 3
RUN = (
    f"--num-layers {LAYERS} --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 8 --max-position-embeddings 16 --tokenizer-type NullTokenizer --vocab-size 4095 "
    "--mock-data --train-iters 4 --lr 1e-3 --eval-iters 1 --eval-interval 2 --log-interval 2 "
    "--num-workers 0 --transformer-impl local "
    f"--num-experts {EXPERTS} --moe-ffn-hidden-size 16 --disable-bias-linear --moe-layer-freq [0,1,1] "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --moe-per-layer-logging --log-moe-balance "
    "--tensorboard-log-interval 1"
)
LINE = re.compile(
    r" experts of layer +(\d+) \| largest load over mean: ([\d.]+) \| smallest load over mean: ([\d.]+) \| "
    r"experts without tokens: (\d+) \| dropped tokens: (\d+) \| router entropy: ([\d.]+) \|"
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_lines_and_points_of_a_run(ranks: int, tmp_path: Path) -> None:
    words = f"{RUN} --tensorboard-dir {tmp_path / 'board'}"
    if ranks == 2:
        words += " --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"  # a stage without
    output = run_ranks(ranks, train, words.split())[-1].output
    lines = [line for line in output.splitlines() if " iteration " in line and "| loss scale: " in line]
    assert len(lines) == 2
    for line in lines:
        names = re.findall(r"\| ([a-z_ ]+): ", line)
        first = names.index("lm loss")
        assert names[first : first + 4] == ["lm loss", "load_balancing_loss", "z_loss", "loss scale"]

    loads = LINE.findall(output)
    assert [int(load[0]) for load in loads] == [2, 3, 2, 3]
    for _, largest, smallest, without, dropped, entropy in loads:
        assert 1.0 <= float(largest) <= EXPERTS and 0.0 <= float(smallest) <= 1.0
        assert (int(without), int(dropped)) == (0, 0)
        assert 0.0 < float(entropy) <= math.log(EXPERTS)

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for name in ("load_balancing_loss", "z_loss"):
        assert [point.step for point in points[name]] == [1, 2, 3, 4]
        for number, point in enumerate(points[name]):
            by_layer = [points[f"moe/{name}_layer_{layer}"][number].value for layer in range(LAYERS)]
            assert by_layer[0] == 0.0
            assert point.value == pytest.approx(sum(by_layer) / 2, rel=1e-5)  # two layers have experts
        # The line shows the mean over its two steps.
        mean = (points[name][2].value + points[name][3].value) / 2
        shown = re.search(rf"\| {name}: (\S+) \|", lines[1])
        assert shown and float(shown[1]) == pytest.approx(mean, rel=1e-5)
    for layer in (1, 2):
        # Both steps of the line: 8 sequences of 16 tokens with 2 experts each; evaluations do not count.
        counts = [points[f"moe/tokens_expert_{expert}_layer_{layer}"][0] for expert in range(EXPERTS)]
        assert sum(point.value for point in counts) == 2 * 8 * 16 * 2
        assert {point.step for point in counts} == {2}
    assert "moe/tokens_expert_0_layer_0" not in points


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log prints, without writers."""
    lines: list[str] = []
    monkeypatch.setattr(expert_log, "print_rank_last", lines.append)
    monkeypatch.setattr(expert_log, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(expert_log, "get_wandb_writer", lambda: None)
    return lines


def test_experts_that_starve_are_named_once_each_time(
    printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=3, add_bias_linear=False
    )
    loads: list[list[int]] = []
    monkeypatch.setattr(
        expert_log, "take_loads", lambda layers, experts: [tracker.Load(1, loads[-1], 0, 0.1)]
    )
    log, args = LoadLog(), Namespace(log_interval=10)
    history = [[9, 0, 0]] * STARVING_LINES + [[5, 4, 0]] * 3 + [[9, 0, 0]] * STARVING_LINES
    warned = {}
    for number, load in enumerate(history):
        before = len(printed)
        loads.append(load)
        log.write(args, config, number)
        warned[number] = [line for line in printed[before:] if line.startswith("WARNING")]
    assert {number for number, lines in warned.items() if lines} == {STARVING_LINES - 1, len(history) - 1}
    (first,), (second,) = warned[STARVING_LINES - 1], warned[len(history) - 1]
    assert "layer 1: no token has reached expert 1, 2 for 50 iterations" in first
    assert "--moe-router-enable-expert-bias" in first
    assert "no token has reached expert 1 for 50" in second
