"""The distributed optimizer: the ordinary one's arithmetic on a share of the state, and that state's file."""

import os
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.errors import CheckpointError, ConfigError, NotBuiltYetError
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, sharded_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from tests.distributed.pool import run_ranks
from tests.unit_tests.distributed.small_training import WIDTH, Net, Training, make_config

SHARDED = {"use_distributed_optimizer": True}
BUCKETS = {**SHARDED, "overlap_grad_reduce": True, "bucket_size": 200}
NO_CLIP = {"clip_grad": 0.0, "log_num_zeros_in_grad": True}


def test_range_has_a_length_and_can_be_moved() -> None:
    assert (Range(3, 10).size, len(Range(3, 10))) == (7, 7)
    assert Range(3, 10).normalize() == Range(0, 7)
    assert Range(3, 10).normalize(5) == Range(5, 12)


# --- arithmetic -----------------------------------------------------------------------------------------


def train(ddp: dict[str, Any], steps: int = 4, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    training = Training(ddp, **options)
    results = [training.step(step) for step in range(steps)]
    return results, training.parameters()


@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_same_bits_as_the_ordinary_optimizer(optimizer: str, precision: str, in_fp32: bool) -> None:
    """Without clipping every element goes through the same operations (of two ranks a sum has one order)."""
    common = {"precision": precision, "settings": {**NO_CLIP, "optimizer": optimizer}}
    grads = {"grad_reduce_in_fp32": in_fp32}
    ordinary = run_ranks(2, train, grads, **common)
    for ddp in (SHARDED, {**BUCKETS, "overlap_param_gather": True}):
        for (results, params), (expected, expected_params) in zip(
            run_ranks(2, train, {**grads, **ddp}, **common), ordinary, strict=True
        ):
            for name, param in params.items():
                assert torch.equal(param, expected_params[name]), name
            assert [zeros for _, _, zeros in results] == [zeros for _, _, zeros in expected]
            # The norm is a sum in another order.
            norms = [norm for _, norm, _ in expected]
            assert [norm for _, norm, _ in results] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clipping_differs_by_the_rounding_of_the_norm(precision: str) -> None:
    tolerance = {"fp32": 1e-6, "bf16": 1e-2}[precision]
    expected = run_ranks(4, train, {}, precision=precision)
    found = run_ranks(4, train, SHARDED, precision=precision)
    for (_, params), (_, expected_params) in zip(found, expected, strict=True):
        for name, param in params.items():
            torch.testing.assert_close(param, expected_params[name], rtol=tolerance, atol=tolerance)


def overflow_on_one_rank(ddp: dict[str, Any], rank: int) -> dict[str, Any]:
    """A step in which one rank's gradients are Inf in one element."""
    training = Training(ddp, precision="fp16", settings={"hysteresis": 1})
    training.step(0)
    before, scale = training.parameters(), training.optimizer.get_loss_scale().item()
    training.model.zero_grad_buffer()
    if dist.get_rank() == rank:
        training.module.head.weight.main_grad[0, 3] = float("inf")
    training.model.start_grad_sync()
    training.model.finish_grad_sync()
    result = training.optimizer.step()
    return {
        "result": result,
        "unchanged": all(torch.equal(before[name], p) for name, p in training.parameters().items()),
        "scales": (scale, training.optimizer.get_loss_scale().item()),
        "next": training.step(1)[0],
    }


@pytest.mark.parametrize("ddp", [{}, SHARDED, {**BUCKETS, "overlap_param_gather": True}])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ddp: dict[str, Any], rank: int) -> None:
    for answer in run_ranks(2, overflow_on_one_rank, ddp, rank):
        assert answer == {
            "result": (False, None, None),
            "unchanged": True,
            "scales": (64.0, 32.0),
            "next": True,
        }


# --- what a rank holds ----------------------------------------------------------------------------------


def holdings() -> dict[str, Any]:
    training = Training(SHARDED, precision="bf16")
    training.step(0)
    (member,) = training.optimizer.chained_optimizers
    state = member.optimizer.state.values()
    return {
        "moments": sum(entry["exp_avg"].numel() for entry in state),
        "main": sum(shard.main_data.numel() for shards in member.shards for shard in shards),
        "listed": sum(param.numel() for param in member.get_parameters()),
        "buffer": training.model.buffers[0].numel,
        "own": {
            name: None if param.main_param is None else param.main_param.numel()
            for name, param in training.module.named_parameters()
        },
        "sharded": {param.main_param_sharded for param in training.module.parameters()},
        "group": member.get_grad_stats_parallel_group() is dist.group.WORLD,
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_state_is_one_share_per_rank(ranks: int) -> None:
    answers = run_ranks(ranks, holdings)
    sizes = {name: param.numel() for name, param in Net().named_parameters()}
    for answer in answers:
        assert answer["main"] * ranks == answer["buffer"]
        assert answer["moments"] == answer["listed"] <= answer["main"]
        assert answer["sharded"] == {True}
        assert answer["group"]
    # Together the shares hold every element once.
    for name, size in sizes.items():
        assert sum(answer["own"][name] or 0 for answer in answers) == size
    assert sum(answer["moments"] for answer in answers) == sum(sizes.values())


# --- state ----------------------------------------------------------------------------------------------


def save(directory: str, ddp: dict[str, Any], precision: str = "bf16", steps: int = 3) -> dict[str, Any]:
    training = Training({**ddp, "grad_reduce_in_fp32": True}, precision=precision)
    for step in range(steps):
        training.step(step)
    training.optimizer.save_parameter_state(f"{directory}/distrib_optim.pt")
    saved = {"model": training.parameters(), "optimizer": training.optimizer.state_dict()}
    if dist.get_rank() == 0:
        torch.save(saved, f"{directory}/model.pt")
    later = [training.step(step) for step in range(steps, steps + 2)]
    return {"saved": saved["optimizer"], "later": later, "parameters": training.parameters()}


def resume(directory: str, ddp: dict[str, Any], precision: str = "bf16", steps: int = 3) -> dict[str, Any]:
    training = Training({**ddp, "grad_reduce_in_fp32": True}, precision=precision)
    training.step(77)  # state that loading must replace
    saved = torch.load(f"{directory}/model.pt", weights_only=True)
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    training.optimizer.load_parameter_state(f"{directory}/distrib_optim.pt")
    again = training.optimizer.get_parameter_state_dp_zero()
    later = [training.step(step) for step in range(steps, steps + 2)]
    return {"again": again, "later": later, "parameters": training.parameters()}


@pytest.mark.parametrize("ddp", [SHARDED, BUCKETS, {**BUCKETS, "overlap_param_gather": True}])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_optimizer_gives_the_same_bits(tmp_path: Path, precision: str, ddp: dict[str, Any]) -> None:
    straight = run_ranks(2, save, str(tmp_path), ddp, precision)
    resumed = run_ranks(2, resume, str(tmp_path), ddp, precision)
    for rank in range(2):
        assert resumed[rank]["later"] == straight[rank]["later"]
        for name, param in straight[rank]["parameters"].items():
            assert torch.equal(resumed[rank]["parameters"][name], param), name
    file = torch.load(tmp_path / "distrib_optim.pt", weights_only=True)
    types = next(iter(file[0]))
    for key in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(resumed[0]["again"][0][types][key], file[0][types][key])
    assert resumed[1]["again"] is None


def collect_in_pieces(at_once: int, on_host: bool) -> dict[str, Any]:
    """State collected and handed out whole and in pieces, and the largest message on the way."""
    training = Training(SHARDED)
    training.step(0)
    (member,) = training.optimizer.chained_optimizers
    if not on_host:
        member.data_parallel_group_gloo = None
    whole = member.get_parameter_state_dp_zero()
    largest, gather, scatter = [0], dist.gather, dist.scatter

    def measured(function: Any) -> Any:
        def call(own: Tensor, pieces: list[Tensor] | None, **kwargs: Any) -> None:
            largest[0] = max(largest[0], sum(piece.numel() for piece in pieces or [own]))
            function(own, pieces, **kwargs)

        return call

    with (
        mock.patch.object(sharded_state, "_AT_ONCE", at_once),
        mock.patch.object(dist, "gather", measured(gather)),
        mock.patch.object(dist, "scatter", measured(scatter)),
    ):
        in_pieces = member.get_parameter_state_dp_zero()
        for main in member.get_parameters():
            main.data.zero_()
        member.load_parameter_state_from_dp_zero(whole)
    again = member.get_parameter_state_dp_zero()
    return {"whole": whole, "pieces": in_pieces, "again": again, "largest": largest[0]}


@pytest.mark.parametrize("on_host", [False, True])
def test_state_travels_in_pieces_that_do_not_grow_with_the_model(on_host: bool) -> None:
    first, second, _ = run_ranks(3, collect_in_pieces, 100, on_host)
    assert 0 < first["largest"] <= 100 and second["largest"] <= 33
    assert second["whole"] is second["pieces"] is second["again"] is None
    (expected,) = first["whole"][0].values()
    for other in ("pieces", "again"):
        (found,) = first[other][0].values()
        assert found.keys() == expected.keys()
        for key in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found[key], expected[key]), (other, key)


def test_other_numbers_of_ranks_may_go_on_while_buckets_stay(tmp_path: Path) -> None:
    run_ranks(2, save, str(tmp_path), SHARDED)
    file = torch.load(tmp_path / "distrib_optim.pt", weights_only=True)
    for ranks in (1, 4):
        again = run_ranks(ranks, resume, str(tmp_path), SHARDED)[0]["again"]
        types = (torch.bfloat16, torch.float32)
        assert torch.equal(again[0][types]["exp_avg_sq"], file[0][types]["exp_avg_sq"])


def test_the_file_is_that_of_megatron_core(tmp_path: Path) -> None:
    """Keys, types, and every parameter's fp32 values at the place that the layout rules give it."""
    answer = run_ranks(2, save, str(tmp_path), SHARDED)[0]
    file = torch.load(tmp_path / "distrib_optim.pt", weights_only=True)
    assert list(file) == ["buckets_coalesced", 0]
    assert file["buckets_coalesced"] is True
    assert list(file[0]) == [(torch.bfloat16, torch.float32)]
    entry = file[0][(torch.bfloat16, torch.float32)]
    assert set(entry) == {"param", "exp_avg", "exp_avg_sq", "numel_unpadded"}
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    names = [name for name, _ in Net().named_parameters()][::-1]
    end = 0
    for name in names:
        start = -(-end // 64) * 64
        assert not any(entry[key][end:start].any() for key in ("param", "exp_avg", "exp_avg_sq"))
        end = start + saved[name].numel()
        values = entry["param"][start:end].view(saved[name].shape)
        assert torch.equal(values.bfloat16(), saved[name]), name
        assert entry["exp_avg"][start:end].any() == (name != "idle")
    assert entry["numel_unpadded"] == end == entry["param"].numel()
    assert {entry[key].dtype for key in ("param", "exp_avg", "exp_avg_sq")} == {torch.float32}
    assert list(answer["saved"]) == ["optimizer"]
    groups = answer["saved"]["optimizer"]["param_groups"]
    assert list(answer["saved"]["optimizer"]) == ["param_groups"]
    assert [(group["step"], group["wd_mult"], "params" in group) for group in groups] == [
        (3.0, 0.0, False),
        (3.0, 1.0, False),
    ]


def refusal(directory: str, ddp: dict[str, Any], change: str) -> str:
    training = Training({**ddp, "grad_reduce_in_fp32": change != "types"}, precision="bf16")
    before = training.optimizer.get_parameter_state_dp_zero()
    state = None
    if dist.get_rank() == 0:
        state = torch.load(f"{directory}/distrib_optim.pt", weights_only=True)
        if change == "buffers":
            state[1] = state[0]
        if change == "swapped":
            state = {"buckets_coalesced": True, 1: state[0]}
        if change == "moments":
            for entry in state[0].values():
                del entry["exp_avg"]
    with pytest.raises(CheckpointError) as caught:
        training.optimizer.load_parameter_state_from_dp_zero(state)
    after = training.optimizer.get_parameter_state_dp_zero()
    if before is not None:
        (kept,), (now,) = before[0].values(), after[0].values()
        assert all(torch.equal(kept[key], now[key]) for key in ("param", "exp_avg", "exp_avg_sq"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("ddp", "change", "words"),
    [
        (BUCKETS, "", "elements, here"),
        ({**BUCKETS, "bucket_size": 141}, "buckets", "cut into other buckets"),
        (SHARDED, "types", r"buffer 0 holds \['\(torch.bfloat16, torch.float32\)'\], here it is"),
        (SHARDED, "buffers", "it has 2 buffers, this run 1"),
        (SHARDED, "swapped", "buffer 0 holds"),
        (SHARDED, "moments", "buffer 0 has no exp_avg"),
    ],
)
def test_state_of_other_buffers_is_refused_on_all_ranks(
    tmp_path: Path, ddp: dict[str, Any], change: str, words: str
) -> None:
    # Buckets of 77 elements and of 141 add up to the same length, with gaps at other places.
    run_ranks(2, save, str(tmp_path), {**BUCKETS, "bucket_size": 77} if change == "buckets" else SHARDED)
    messages = run_ranks(2, refusal, str(tmp_path), ddp, change)
    assert messages[0] == messages[1]
    with pytest.raises(CheckpointError, match=f"{words}.*no_load_optim"):
        raise CheckpointError(messages[0])


def test_the_other_kind_of_state_is_refused() -> None:
    sharded, ordinary = Training(BUCKETS, precision="bf16"), Training({}, precision="bf16")
    ordinary.step(0)
    with pytest.raises(CheckpointError, match="use_distributed_optimizer"):
        sharded.optimizer.load_state_dict(ordinary.optimizer.state_dict())
    with pytest.raises(CheckpointError, match="distributed optimizer"):
        ordinary.optimizer.load_state_dict(sharded.optimizer.state_dict())
    plain = Training({})
    with pytest.raises(CheckpointError, match="use_distributed_optimizer"):
        sharded.optimizer.load_state_dict(plain.optimizer.state_dict())
    with pytest.raises(CheckpointError, match="has 1 groups of parameters, this run 2"):
        state = sharded.optimizer.state_dict()
        del state["optimizer"]["param_groups"][1]
        sharded.optimizer.load_state_dict(state)
    with pytest.raises(ConfigError, match="use_distributed_optimizer"):
        plain.optimizer.get_parameter_state_dp_zero()
    with pytest.raises(CheckpointError, match=r"before Megatron core 0\.8"):
        sharded.optimizer.load_parameter_state_from_dp_zero({0: {}})
    with pytest.raises(NotBuiltYetError, match="ckpt_convert_update_legacy_dist_opt_format"):
        sharded.optimizer.load_parameter_state_from_dp_zero({0: {}}, update_legacy_format=True)


def test_weights_from_elsewhere_refresh_the_copies() -> None:
    training = Training(SHARDED, precision="bf16")
    for param in training.module.parameters():
        param.data.fill_(0.25)
    training.optimizer.reload_model_params()
    (member,) = training.optimizer.chained_optimizers
    assert all(main.eq(0.25).all() for main in member.get_parameters())


def test_an_unwrapped_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk 0 is not wrapped"):
        get_megatron_optimizer(OptimizerConfig(lr=1e-3, **SHARDED), [Net()])
    plain = DistributedDataParallel(make_config(), DistributedDataParallelConfig(), Net())
    with pytest.raises(ConfigError, match="chunk 0 is not wrapped"):
        get_megatron_optimizer(OptimizerConfig(lr=1e-3, **SHARDED), [plain])
    member = Training(SHARDED).optimizer.chained_optimizers[0]
    inner = torch.optim.AdamW(plain.parameters())
    with pytest.raises(ConfigError, match="chunk 0 is not wrapped"):
        DistributedOptimizer(inner, member.config, None, None, [plain], {0: plain.buffers}, None, None, 0, 0)
    with pytest.raises(ConfigError, match="needs parameters in buffers"):
        DistributedOptimizer(
            inner, member.config, None, None, member.model_chunks, {0: plain.buffers}, None, None, 0, 0
        )


class Hostile:
    """Makes a directory where it is unpickled without restriction."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.directory),)


def load_hostile_state(directory: Path) -> bool:
    """Whether a file that is refused has had its way."""
    optimizer = Training(SHARDED).optimizer
    member = optimizer.chained_optimizers[0]
    torch.save(Hostile(directory / "made"), directory / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        member.load_parameter_state(str(directory / "state.pt"))
    return (directory / "made").exists()


def test_a_file_of_state_is_not_unpickled_without_restriction(tmp_path: Path) -> None:
    assert run_ranks(1, load_hostile_state, tmp_path) == [False]


# --- gathers of several chunks --------------------------------------------------------------------------


def names_in_order_of_gathers() -> tuple[list[int], int]:
    """Places in forward of the buckets of three chunks, following each gather to the next; their number."""
    parallel_state.initialize_model_parallel()
    ddp = DistributedDataParallelConfig(**BUCKETS, overlap_param_gather=True)
    chunks = [DistributedDataParallel(make_config(), ddp, Net()) for _ in range(3)]
    get_megatron_optimizer(OptimizerConfig(lr=1e-3, **SHARDED), chunks)
    names = {
        param: f"{number} {name}"
        for number, chunk in enumerate(chunks)
        for name, param in chunk.module.named_parameters()
    }
    order, found = list(names.values()), []
    group = chunks[0].bucket_groups[-1]
    while group is not None:
        found.append(min((names[p] for bucket in group.buckets for p in bucket.params), key=order.index))
        group = group.next_param_gather_bucket_group
    return [order.index(name) for name in found], sum(len(chunk.bucket_groups) for chunk in chunks)


def test_gathers_go_on_with_the_next_chunk() -> None:
    for order, buckets in run_ranks(2, names_in_order_of_gathers):
        assert order == sorted(order)
        assert len(order) == buckets > 3


# --- parts of the model on other ranks ------------------------------------------------------------------


def norm_over_tensor_ranks(sharded: bool) -> tuple[float, float]:
    """Norm and zeros on 2 tensor- x 2 data-parallel ranks, of gradients that are the rank's own."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    net = Net()
    for name, param in net.named_parameters():
        param.tensor_model_parallel = name.startswith("layers")
        param.shared = name.startswith("norms.1")
    training = Training(
        {"use_distributed_optimizer": sharded},
        settings={"use_distributed_optimizer": sharded, "clip_grad": 0.0, "log_num_zeros_in_grad": True},
        module=net,
    )
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, param in net.named_parameters():
        # Replicated gradients are equal; split ones differ.
        param.main_grad.fill_(2.0 + tensor_rank if name.startswith("layers") else 1.0)
    net.head.weight.main_grad[0, 0] = 0.0
    training.model.finish_grad_sync()
    _, norm, zeros = training.optimizer.step()
    return norm, zeros


@pytest.mark.parametrize("sharded", [False, True])
def test_the_norm_counts_every_parameter_of_the_model_once(sharded: bool) -> None:
    layers = 3 * (WIDTH * WIDTH + WIDTH)
    # Two norms (the third is a shared copy), the head but its zero, and the idle parameter.
    once = 2 * 2 * WIDTH + WIDTH - 1 + 5
    expected = (layers * (4.0 + 9.0) + once) ** 0.5
    for norm, zeros in run_ranks(4, norm_over_tensor_ranks, sharded):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert zeros == 1.0
