"""Level 3: ``pretrain_gpt.py`` on virtual NPUs gives the losses of one plain CPU process.

The CPU's runs know nothing of torch_npu. Initial weights are equal, because a virtual NPU's generator starts
like the CPU's; dropout is off where losses are compared.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_npu.virtual.cann import why_not
from tests.distributed.layouts import GLOBAL_BATCH, SEQUENCE, Layout
from tests.functional_tests.launcher import Run, pretrain_gpt, pretrain_gpt_ranks
from tests.npu import runs

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no virtual NPU: {why_not()}")

STEPS = 6
MODELS = {
    "llama": "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --group-query-attention"
    " --num-query-groups 4 --position-embedding-type rope --normalization RMSNorm --swiglu"
    " --ffn-hidden-size 96 --untie-embeddings-and-output-weights --disable-bias-linear",
    "gpt": "--num-layers 4 --hidden-size 64 --num-attention-heads 8",
}
# The loss of each sequence does not depend on how a batch is spread over ranks and micro-batches.
MODELS["moe"] = MODELS["llama"].replace("--num-layers 4", "--num-layers 2") + (
    " --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-grouped-gemm"
    " --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type seq_aux_loss"
    " --moe-aux-loss-coeff 0.01"
)
COMMON = f"""
    --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --global-batch-size {GLOBAL_BATCH}
    --train-iters {STEPS} --lr 2e-3 --lr-decay-style constant --init-method-std 0.1
    --tokenizer-type NullTokenizer --vocab-size 500 --split 90,8,2 --log-interval 1
    --eval-iters 1 --eval-interval 1000 --num-workers 0 --transformer-impl local --ckpt-format torch
    --use-flash-attn
"""
NO_DROPOUT = "--attention-dropout 0 --hidden-dropout 0"
# Largest relative difference of a loss; half precisions round in other places on the two devices.
PRECISIONS = {
    "fp32": ("", 1e-4),
    "bf16": ("--bf16", 5e-3),
    "fp16": ("--fp16 --initial-loss-scale 1048576 --hysteresis 1", 1e-3),
}
# Ranks that share a batch scale gradients of a part of it: the search for a loss scale meets overflows at
# other steps than one process does, so layouts are compared at a scale that fits all of them.
FITTING = "fp16 at a scale that fits"
SETTINGS = PRECISIONS | {FITTING: ("--fp16 --initial-loss-scale 1024", PRECISIONS["fp16"][1])}
# Operators of Ascend's that a run of the model has to call, whatever its layout.
OPERATORS = {
    "npu_rms_norm", "npu_rms_norm_backward", "npu_swiglu", "npu_swiglu_backward", "npu_rotary_mul",
    "npu_fusion_attention", "npu_fusion_attention_grad", "npu_apply_adam_w.out",
}  # fmt: skip


@pytest.fixture(scope="module")
def npus() -> Iterator[runs.Machine]:
    with runs.machine() as machine:
        yield machine


@pytest.fixture
def report(capsys: pytest.CaptureFixture) -> Callable[[str], None]:
    """Prints a figure past pytest's capture."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\nNPU level 3, {text}")

    return print_it


@pytest.fixture(scope="module")
def old_npus() -> Iterator[runs.Machine]:
    """Of the first generation: no Inf and no NaN, an overflow shows in a flag alone."""
    with runs.machine(soc="Ascend910A") as machine:
        yield machine


Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """Makes command lines; runs of the module share an index cache."""
    data = ["--data-path", str(golden / "data" / "u16_text_document")]
    data += ["--data-cache-path", str(tmp_path_factory.mktemp("cache"))]

    def make(layout: Layout, extra: str = "", dropout: str = NO_DROPOUT) -> list[str]:
        # The padded vocabulary may not depend on the layout, or initial weights would.
        text = f"{COMMON} {MODELS[layout.model]} {dropout} {extra}"
        return [*text.split(), *layout.words(), *data]

    return make


@pytest.fixture(scope="module")
def on_cpu(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """The run of one plain CPU process, by model and precision."""

    @functools.cache
    def run(model: str, precision: str) -> Run:
        layout = Layout(model=model)
        return pretrain_gpt(words(layout, SETTINGS[precision][0]), tmp_path_factory.mktemp("cpu")).check()

    return run


def worst(found: Run, wanted: Run) -> float:
    """Largest relative difference of a loss, in training or evaluation."""
    assert found.losses.keys() == wanted.losses.keys() and len(wanted.losses) >= 1
    assert found.evaluations.keys() == wanted.evaluations.keys()
    pairs = [(found.losses[step], wanted.losses[step]) for step in wanted.losses]
    pairs += [(found.evaluations[label], wanted.evaluations[label]) for label in wanted.evaluations]
    assert all(math.isfinite(value) for pair in pairs for value in pair)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def scales(run: Run) -> list[tuple[str, str]]:
    """Loss scale and skipped iterations of each log line."""
    return re.findall(r"loss scale: ([0-9.]+) .*skipped iterations: +([0-9]+)", run.output)


def operators(tmp_path: Path, rank: int) -> set[str]:
    return set(json.loads((tmp_path / f"calls_{rank}.json").read_text()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_npu(npus, words, on_cpu, tmp_path: Path, precision: str, report) -> None:
    flags, bound = PRECISIONS[precision]
    (run,) = npus.pretrain_gpt(1, words(Layout(model="llama"), flags), tmp_path)
    wanted = on_cpu("llama", precision)
    difference = worst(run, wanted)
    report(f"one NPU, {precision}: losses differ by {difference:.1e} (bound {bound:.0e})")
    assert difference < bound
    assert operators(tmp_path, 0) >= OPERATORS
    assert scales(run) == scales(wanted)
    if precision == "fp16":
        assert {skipped for _, skipped in scales(run)} == {"0", "1"}, "no step overflowed, or all did"


def test_defaults_train_as_well(npus, words, on_cpu, tmp_path: Path, report) -> None:
    """Without any replacement; torch_npu then sends torch's own attention to an operator of Ascend's."""
    (run,) = npus.pretrain_gpt(1, words(Layout(model="llama"), "--disable-override all"), tmp_path)
    difference, bound = worst(run, on_cpu("llama", "fp32")), PRECISIONS["fp32"][1]
    report(f"one NPU, nothing replaced, fp32: losses differ by {difference:.1e} (bound {bound:.0e})")
    assert difference < bound
    assert operators(tmp_path, 0) == {"npu_fusion_attention_v3", "npu_fusion_attention_grad_v3"}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(model="moe"), marks=pytest.mark.slow), Layout(dp=2, ep=2, model="moe")],
    ids=str,
)
def test_experts_on_npus(npus, words, on_cpu, tmp_path, layout, precision, report) -> None:
    """With an operator of Ascend's in the place of every part of a layer of experts, at every call."""
    flags, bound = PRECISIONS[precision]
    fused = precision != "fp32"
    # Ascend has no operator that adds gradients of fp32 weights, so these are computed apart.
    flags += "" if fused else " --no-gradient-accumulation-fusion"
    found = npus.pretrain_gpt(layout.world_size, words(layout, flags), tmp_path)
    difference = worst(found[-1], on_cpu("moe", precision))
    report(f"{layout}, {precision}: losses differ by {difference:.1e} (bound {bound:.0e})")
    assert difference < bound
    for point in ("topk_routing", "permute_tokens", "unpermute_tokens", "grouped_mm"):
        assert re.search(rf"> replaced for this device: .*\b{point}\b", found[0].output)
    layers = 2
    backward = layers * STEPS * layout.microbatches
    forward = backward + layers * 2 * layout.microbatches  # two evaluations
    # Two matmuls forward; the gradients of either's input and, if not added at once, of its weights.
    wanted = {
        "npu_moe_gating_top_k": forward,
        "npu_moe_token_permute_with_routing_map": forward + backward,
        "npu_moe_token_permute_with_routing_map_grad": backward,
        "_npu_moe_token_unpermute_with_routing_map": forward,
        "npu_grouped_matmul": 2 * (forward + backward * (1 if fused else 2)),
        "npu_grouped_matmul_add_": 2 * backward if fused else 0,
    }
    for rank in range(layout.world_size):
        calls = json.loads((tmp_path / f"calls_{rank}.json").read_text())
        assert {name: calls.get(name, 0) for name in wanted} == wanted


LAYOUTS = {
    "tensor and sequence parallel": Layout(tp=2, sequence_parallel=True, model="llama"),
    "two stages of two chunks": Layout(pp=2, vpp=2, model="llama"),
    "a ring over the sequence": Layout(cp=2, model="llama"),
    "a sharded optimizer": Layout(dp=2, reduction="sharded-overlap-both", model="llama"),
}
MORE = {
    "everything at once": Layout(tp=2, pp=2, vpp=2, sequence_parallel=True, model="llama"),
    "a ring, sharded": Layout(cp=2, dp=2, reduction="sharded", model="llama"),
    "zb-h1": Layout(pp=2, pipeline="zb-h1", model="llama"),
    "gathered keys": Layout(tp=2, cp=2, context="all_gather", model="llama"),
    "gpt": Layout(tp=2, dp=2, sequence_parallel=True, model="gpt"),
}


def hold_to_the_cpu(npus, words, on_cpu, tmp_path: Path, layout: Layout, precision: str) -> str:
    flags, bound = SETTINGS[precision]
    all_runs = npus.pretrain_gpt(layout.world_size, words(layout, flags), tmp_path)
    difference = worst(all_runs[-1], on_cpu(layout.model, precision))
    assert difference < bound
    for rank in range(layout.world_size):
        assert {"npu_fusion_attention_grad", "npu_apply_adam_w.out"} <= operators(tmp_path, rank)
    return f"{layout}, {precision}: losses differ by {difference:.1e} (bound {bound:.0e})"


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_npus(npus, words, on_cpu, tmp_path: Path, name: str, report) -> None:
    report(hold_to_the_cpu(npus, words, on_cpu, tmp_path, LAYOUTS[name], "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", FITTING])
@pytest.mark.parametrize("name", LAYOUTS)
def test_several_npus_in_half_precision(npus, words, on_cpu, tmp_path, name, precision, report) -> None:
    report(hold_to_the_cpu(npus, words, on_cpu, tmp_path, LAYOUTS[name], precision))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_layouts(npus, words, on_cpu, tmp_path: Path, name: str, report) -> None:
    report(hold_to_the_cpu(npus, words, on_cpu, tmp_path, MORE[name], "fp32"))


# Fused kernels want inner sizes from 256 on, also of what a rank holds.
WIDE = "--hidden-size 512 --ffn-hidden-size 512 --num-layers 2 --bf16"


def test_products_that_send_while_they_multiply(npus, words, tmp_path: Path, report) -> None:
    layers, bound = 2, PRECISIONS["bf16"][1]
    one = pretrain_gpt(words(Layout(model="llama"), WIDE), tmp_path).check()
    layout = Layout(tp=2, sequence_parallel=True, model="llama")
    apart = npus.pretrain_gpt(2, words(layout, WIDE), tmp_path)[-1]
    found = npus.pretrain_gpt(2, words(layout, f"{WIDE} --use-ascend-mc2"), tmp_path)[-1]
    difference, from_separate = worst(found, one), worst(found, apart)
    report(
        f"{layout} with fused products, bf16: losses differ by {difference:.1e} (bound {bound:.0e}), from "
        f"those with separate traffic by {from_separate:.1e}"
    )
    assert difference < bound and from_separate < 1e-4
    # Two of each kind a layer in either direction; the output layer gathers forward and scatters back. The
    # two evaluations have a forward pass only.
    steps, evaluations = (layout.microbatches * iterations for iterations in (STEPS, 2))
    gathers = steps * (4 * layers + 1) + evaluations * (2 * layers + 1)
    scatters = steps * (4 * layers + 1) + evaluations * 2 * layers
    for rank in range(2):
        calls = json.loads((tmp_path / f"calls_{rank}.json").read_text())
        assert calls["npu_all_gather_base_mm"] == gathers
        assert calls["npu_mm_reduce_scatter_base"] == scatters


RESUMED = {
    "alone": Layout(model="llama"),
    "tensor parallel, sharded": Layout(tp=2, model="llama", sequence_parallel=True),
}


@pytest.mark.parametrize(
    "name",
    ["alone", pytest.param("tensor parallel, sharded", marks=pytest.mark.slow)],
)
def test_checkpoints_cross_over(npus, words, on_cpu, tmp_path: Path, name: str, report) -> None:
    layout = RESUMED[name]
    saving = f"--save {tmp_path / 'npu'} --save-interval 2"
    npus.pretrain_gpt(layout.world_size, words(layout, saving), tmp_path)
    loading = f"--load {tmp_path / 'npu'} --ckpt-step 2 --save {tmp_path / 'cpu'} --save-interval 2"
    there = pretrain_gpt_ranks(layout.world_size, words(layout, loading), tmp_path)[-1].check()
    loading = f"--load {tmp_path / 'cpu'} --ckpt-step 4"
    back = npus.pretrain_gpt(layout.world_size, words(layout, loading), tmp_path)[-1]
    wanted = on_cpu("llama", "fp32")
    for run, first in ((there, 3), (back, 5)):
        assert list(run.losses) == list(range(first, STEPS + 1))
        difference = max(abs(loss / wanted.losses[step] - 1) for step, loss in run.losses.items())
        report(f"{name}, resumed at {first}: losses differ by {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.parametrize("layout", [Layout(model="llama"), Layout(model="llama", cp=2, dp=2)], ids=str)
def test_resuming_on_an_npu_repeats_dropout(npus, words, tmp_path: Path, layout: Layout) -> None:
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    extra = f"{recompute} --save {tmp_path} --save-interval 3"
    dropout = "--attention-dropout 0.2 --hidden-dropout 0.2"
    whole = npus.pretrain_gpt(layout.world_size, words(layout, extra, dropout), tmp_path)[-1]
    line = words(layout, f"{extra} --load {tmp_path} --ckpt-step 3", dropout)
    resumed = npus.pretrain_gpt(layout.world_size, line, tmp_path)[-1]
    assert resumed.losses == {step: whole.losses[step] for step in (4, 5, 6)}


SCHEDULES = {
    "alone": Layout(model="llama"),
    "1f1b": Layout(pp=2, model="llama"),
    "interleaved": Layout(pp=2, vpp=2, model="llama"),
    "zb-h1": Layout(pp=2, pipeline="zb-h1", model="llama"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_saturating_chip_skips_steps_that_overflow(
    old_npus, words, on_cpu, tmp_path, schedule, report
) -> None:
    flags, bound = PRECISIONS["fp16"]
    layout = SCHEDULES[schedule]
    run = old_npus.pretrain_gpt(layout.world_size, words(layout, flags), tmp_path)[-1]
    wanted = on_cpu("llama", "fp16")
    assert scales(run) == scales(wanted)
    difference = worst(run, wanted)
    report(f"910A, {schedule}, fp16: {scales(run)}, losses differ by {difference:.1e} (bound {bound:.0e})")
    assert difference < bound
