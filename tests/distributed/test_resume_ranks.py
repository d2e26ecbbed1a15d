"""A run over ranks that is stopped and started again is the same run, bit for bit, with dropout on."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.expert_layouts import BARES, bare, name_of, pairs_of_flags
from tests.distributed.expert_layouts import spread as spread_experts
from tests.distributed.gpt_run import command_line
from tests.distributed.layouts import Layout, bare_layouts, spread
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import train
from tests.same_bits import assert_same_bits

STEPS = 4
LAYOUTS = [
    Layout(tp=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2, model="llama"),
    Layout(cp=2),
    Layout(dp=2),
    Layout(dp=2, reduction="sharded-overlap-both", model="llama"),
    Layout(tp=2, pp=2, dp=2, sequence_parallel=True, reduction="sharded"),
]
_EXCHANGE = "--moe-token-dispatcher-type alltoall"
_BIAS = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05 "
    "--moe-router-load-balancing-type none"
)
# With the directories of their files: tensor-parallel, pipeline and expert-parallel rank.
EXPERT_LAYOUTS = {
    "ep2-sharded": (
        bare(dp=2, ep=2, reduction="sharded", experts=f"{_EXCHANGE} --moe-grouped-gemm {_BIAS}"),
        ["mp_rank_00_000", "mp_rank_00_001"],
    ),
    "pp2-ep2": (
        bare(pp=2, dp=2, ep=2, experts="--moe-token-dispatcher-type allgather"),
        ["mp_rank_00_000_000", "mp_rank_00_000_001", "mp_rank_00_001_000", "mp_rank_00_001_001"],
    ),
    "tp2-ep2-etp1": (
        bare(tp=2, ep=2, etp=1, experts=f"{_EXCHANGE} --moe-grouped-gemm --moe-aux-loss-coeff 0.1"),
        ["mp_rank_00_000", "mp_rank_01_001"],
    ),
    # Replicas of whole experts on the ranks that split dense layers: both have files.
    "tp2-etp1-sharded": (
        bare(tp=2, dp=2, etp=1, reduction="sharded-overlap-both", experts=f"{_EXCHANGE} {_BIAS}"),
        ["mp_rank_00", "mp_rank_01"],
    ),
    # Experts in more parts than dense layers: named by the former.
    "etp2-sharded": (
        bare(dp=2, etp=2, reduction="sharded", experts="--moe-token-dispatcher-type flex"),
        ["mp_rank_00", "mp_rank_01"],
    ),
    "cp2-ep2-sharded": (
        bare(cp=2, dp=2, ep=2, reduction="sharded", experts="--moe-input-jitter-eps 0.1"),
        ["mp_rank_00_000", "mp_rank_00_001"],
    ),
}


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(layout, data_cache, save, *extra):
    """Losses of the steps of one run, as the ranks know them; it loads from ``save`` and saves there."""
    dropout = "--attention-dropout 0.1 --hidden-dropout 0.1 --save-interval 100 --bf16"
    argv = command_line(layout, data_cache, dropout)
    argv += ["--save", str(save), "--load", str(save), *extra]
    records = run_ranks(layout.world_size, train, argv, False, timeout=600)
    return [record.losses for record in records]


def files(save, iteration=STEPS):
    """Path below the iteration's directory -> content, without what differs between two runs by design."""
    home = save / f"iter_{iteration:07d}"
    found = {}
    for path in sorted(home.rglob("*.pt")):
        content = torch.load(path, weights_only=False)
        if isinstance(content, dict) and "args" in content:  # paths, and where the run started, differ
            content["consumed"] = content.pop("args").consumed_train_samples
        found[str(path.relative_to(home))] = content
    return found


def documented_names(layout):
    """Checkpoint directories are named by tensor and, with several stages, pipeline rank; nothing else."""
    names = []
    for tp in range(layout.tp):
        for pp in range(layout.pp):
            home = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if layout.pp > 1 else "")
            names.append(f"{home}/model_optim_rng.pt")
            if layout.reduction.startswith("sharded"):
                names.append(f"{home}/distrib_optim.pt")
    return sorted(names)


def check(layout, data_cache, tmp_path, stops, *extra, names=None):
    """``names``: of the files, where those of experts' ranks are among them."""
    whole = run(layout, data_cache, tmp_path / "whole", *extra)
    expected = files(tmp_path / "whole")
    names = documented_names(layout) if names is None else names
    assert list(expected) == names
    everything = {path.name for path in (tmp_path / "whole" / f"iter_{STEPS:07d}").rglob("*")}
    assert everything == {part for name in names for part in name.split("/")}
    for stop in stops:
        save = tmp_path / f"stop{stop}"
        before = run(layout, data_cache, save, "--exit-interval", str(stop), *extra)
        assert (save / "latest_checkpointed_iteration.txt").read_text() == str(stop)
        after = run(layout, data_cache, save, *extra)
        assert [first + second for first, second in zip(before, after, strict=True)] == whole
        assert_same_bits(files(save), expected, f"{layout} stopped after {stop}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_resumed_run_equals_the_uninterrupted_one(layout, data_cache, tmp_path):
    check(layout, data_cache, tmp_path, [2])


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_resumed_run_with_experts_equals_the_uninterrupted_one(name, data_cache, tmp_path):
    layout, directories = EXPERT_LAYOUTS[name]
    in_each = ["distrib_optim.pt"] if layout.reduction.startswith("sharded") else []
    names = [f"{home}/{file}" for home in directories for file in [*in_each, "model_optim_rng.pt"]]
    check(layout, data_cache, tmp_path, [2], names=names)


# Those of the parity tests with every size and every pair of flags.
SPREAD_EXPERTS = spread_experts(BARES, pairs_of_flags)


@pytest.mark.slow
@pytest.mark.parametrize("layout, flags", SPREAD_EXPERTS, ids=map(name_of, SPREAD_EXPERTS))
def test_resumed_run_equals_the_uninterrupted_one_in_every_layout_of_experts(
    layout, flags, data_cache, tmp_path
):
    layout = replace(layout, reduction=flags.reduction, experts=flags.alone())
    words = flags.everywhere().split()
    whole = run(layout, data_cache, tmp_path / "whole", *words)
    expected = files(tmp_path / "whole")
    save = tmp_path / "stopped"
    before = run(layout, data_cache, save, "--exit-interval", "2", *words)
    after = run(layout, data_cache, save, *words)
    assert [first + second for first, second in zip(before, after, strict=True)] == whole
    assert expected
    assert_same_bits(files(save), expected, name_of((layout, flags)))


def test_experts_in_other_parts_than_saved_are_refused(data_cache, tmp_path):
    run(bare(tp=2, etp=1), data_cache, tmp_path)
    with pytest.raises(AssertionError, match="--expert-tensor-parallel-size: 1 in the checkpoint, 2 in this"):
        run(bare(tp=2, etp=2), data_cache, tmp_path)


def test_resume_with_layers_that_predict_further_tokens(data_cache, tmp_path):
    layout = Layout(pp=2, dp=2, reduction="sharded", model="llama")
    check(layout, data_cache, tmp_path, [2], "--mtp-num-layers", "2")
    first, last = (
        content["model"] for path, content in files(tmp_path / "whole").items() if "model_optim_rng" in path
    )
    table = "embedding.word_embeddings.weight"
    # The last stage embeds tokens by a copy, and names its layers as a model on one rank does.
    assert torch.equal(first[table], last[table])
    made_here = {name.split(".")[3] for name in last if name.startswith("mtp.layers.1.")}
    assert made_here == {"enorm", "hnorm", "eh_proj", "transformer_layer", "final_layernorm"}
    assert not any(name.startswith("mtp.") for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("layout", spread(bare_layouts()), ids=str)
def test_resume_at_every_step_equals_the_uninterrupted_run(layout, data_cache, tmp_path):
    check(layout, data_cache, tmp_path, range(1, STEPS))


def test_chunks_of_virtual_stages_are_saved_one_by_one(data_cache, tmp_path):
    layout = Layout(pp=2, vpp=2, reduction="plain")
    run(layout, data_cache, tmp_path)
    for stage in files(tmp_path).values():
        assert "model" not in stage
        for chunk in ("model0", "model1"):
            layers = [name for name in stage[chunk] if name.startswith("decoder.layers.")]
            # Numbers restart in each chunk.
            assert layers and all(name.startswith("decoder.layers.0.") for name in layers)
