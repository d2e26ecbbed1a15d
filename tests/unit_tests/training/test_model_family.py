"""A model family of a user's own, described in one place, in the real training loop."""

import contextlib
import io
import re
import sys
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import ConfigError
from megatron.core.models.family import (
    FAMILIES,
    BatchShape,
    BatchTensor,
    MemoryEstimate,
    ModelFamily,
    ModelShape,
    Stages,
    get_model_family,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

# Vectors have one length and what is predicted from them another, as in a model with encoder and decoder.
B, S, DECODED, HIDDEN, NUMBERS = 2, 8, 6, 4, 16
STEPS = 2
FLAGS = (
    f"--num-layers 1 --hidden-size {HIDDEN} --num-attention-heads 2 --seq-length {S} --micro-batch-size {B} "
    f"--global-batch-size {2 * B} --max-position-embeddings {S} --train-iters {STEPS} --lr 0.01 "
    "--tokenizer-type NullTokenizer --vocab-size 100 --eval-iters 0 --num-workers 0 "
    "--log-interval 1 --log-throughput --distributed-backend gloo --tensor-model-parallel-size 2 "
    "--swap-attention"
)


class Mixer(torch.nn.Module):
    """The layer: one weight."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((config.hidden_size,), 0.5))


class MixerWithSpare(Mixer):
    """One weight more than the formula of the family counts."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.spare = torch.nn.Parameter(torch.zeros(config.hidden_size))


class Regressor(MegatronModule):
    """Predicts numbers [b, d] from the first d of vectors [b, s, h]."""

    def __init__(self, config: TransformerConfig, layer: ModuleSpec) -> None:
        super().__init__(config)
        self.layer = build_module(layer, config)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is one stage."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors[:, :DECODED] @ self.layer.weight


def operations(shape: ModelShape, batch: BatchShape) -> float:
    return 1e12 * batch.sequences * batch.sequence_length * shape.hidden_size


def memory(shape: ModelShape, batch: BatchShape) -> MemoryEstimate:
    return MemoryEstimate(
        layer_weights=0.0,
        block_parameters=7e9,
        table_parameters=2e9,
        layer_activations=0.0,
        input_activations=0.0,
        output_activations=0.0,
        residual_stream=0.0,
        attention_tensors=3e6,
        mlp_activations=5e6,
        linear_inputs=0.0,
        logits=0.0,
    )


def one_per_decoded_token(batch: BatchShape) -> tuple[int, int]:
    assert batch.decoder_sequence_length is not None
    return batch.sequences, batch.decoder_sequence_length


def parameters(model: torch.nn.Module) -> int:
    return model.config.hidden_size


TOY = ModelFamily(
    name="toy",
    batch={
        "vectors": BatchTensor(
            torch.float32, Stages.FIRST, lambda b: (b.sequences, b.sequence_length, HIDDEN)
        ),
        "numbers": BatchTensor(torch.float64, Stages.LAST, one_per_decoded_token),
        "weights": BatchTensor(torch.bool, Stages.LAST, one_per_decoded_token),
    },
    layer_spec=lambda config, with_te_names: ModuleSpec(Mixer),
    operations=operations,
    memory=memory,
    parameters=parameters,
)


class Samples(torch.utils.data.Dataset):
    """Every sample another one, made from its number."""

    def __len__(self) -> int:
        return NUMBERS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(int(index))
        return {
            "vectors": torch.randn(S, HIDDEN, generator=draw),
            "numbers": torch.randn(DECODED, generator=draw, dtype=torch.float64),
            "weights": torch.rand(DECODED, generator=draw) > 0.3,
        }


def build_model(pre_process: bool = True, post_process: bool = True) -> Regressor:
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.model_setup import layer_spec_from_args

    get_args().decoder_seq_length = DECODED  # its flag waits for a family of this package that needs it
    config = core_transformer_config_from_args(get_args())
    return Regressor(config, layer_spec_from_args(get_args(), config))


def sum_of_squares(batch: dict[str, torch.Tensor], output: torch.Tensor) -> tuple[Any, ...]:
    weights = batch["weights"]
    total = ((output - batch["numbers"].float()) ** 2 * weights).sum()
    return total, weights.sum(), {"squares": (total.detach(), weights.sum())}


def train_toy(family: str, flags: str = FLAGS) -> dict[str, Any]:
    """What a rank saw of a run; the family is one more line of the table."""
    from megatron.training import get_args, pretrain
    from megatron.training.utils import get_batch_on_this_tp_rank

    batches, output = [], io.StringIO()

    def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
        batch = get_batch_on_this_tp_rank(data_iterator)
        batches.append({key: value.clone() for key, value in batch.items()})
        return model(batch["vectors"]), partial(sum_of_squares, batch)

    sys.argv = ["pretrain_toy.py", *flags.split()]
    line = {"toy": f"{__name__}.TOY"}
    with mock.patch.dict(FAMILIES, line), contextlib.redirect_stdout(output):
        try:
            pretrain(
                lambda counts: (Samples(), None, None),
                build_model,
                ModelType.encoder_or_decoder,
                forward_step,
                model_family=family,
            )
        except ConfigError as error:
            return {"error": str(error)}
        args, rank = get_args(), parallel_state.get_tensor_model_parallel_rank()
    return {
        "operations": args.num_floating_point_operations_so_far,
        "batches": batches,
        "output": output.getvalue(),
        "rank": rank,
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """The run on two tensor-parallel ranks, of which the first one reads."""
    return run_ranks(2, train_toy, "toy")


def test_batches_have_the_keys_and_types_of_the_family(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["batches"]) == 2 * STEPS
        for number, batch in enumerate(rank["batches"]):
            samples = [Samples()[index] for index in range(number * B, number * B + B)]
            assert list(batch) == ["vectors", "numbers", "weights"]
            for key, value in batch.items():
                expected = torch.stack([sample[key] for sample in samples])
                torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_first_loss_is_the_one_of_the_model(ranks: list[dict[str, Any]]) -> None:
    samples = [Samples()[index] for index in range(2 * B)]
    vectors, numbers, weights = (
        torch.stack([sample[key].double() for sample in samples]) for key in ("vectors", "numbers", "weights")
    )
    squares = (vectors[:, :DECODED].sum(-1) / 2 - numbers) ** 2
    expected = float((squares * weights).sum() / weights.sum())
    logged = [float(loss) for loss in re.findall(r"squares: (\S+) \|", ranks[1]["output"])]
    assert logged[0] == pytest.approx(expected, rel=1e-5)
    assert len(logged) == STEPS


def test_operations_and_memory_are_those_of_the_family(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["operations"] == STEPS * 1e12 * 2 * B * S * HIDDEN
    line = re.search(
        r"elapsed time per iteration \(ms\): ([\d.]+) .* throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)",
        ranks[1]["output"],
    )
    seconds, teraflops = float(line[1]) / 1e3, float(line[2])
    assert teraflops * seconds * 2 == pytest.approx(2 * B * S * HIDDEN, rel=0.05)
    assert "transformer block in billions:  7.00" in ranks[0]["output"]
    assert "embedding layers in billions: 2.00" in ranks[0]["output"]  # tied: one table
    assert "weight and optimizer=" in ranks[0]["output"]
    # Of the 3e6 elements of the one layer, half on each rank, in fp32.
    assert "not saved: about 5.72 MiB per rank" in ranks[0]["output"]


def train_with_a_weight_too_many() -> dict[str, Any]:
    with mock.patch.object(sys.modules[__name__], "Mixer", MixerWithSpare):
        return train_toy("toy", FLAGS.replace("--tensor-model-parallel-size 2", ""))


def test_number_of_parameters_is_compared_with_the_formula_of_the_family() -> None:
    (found,) = run_ranks(1, train_with_a_weight_too_many)
    assert "has 8 parameters but its configuration implies 4" in found["error"]


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model family 'gpt5'; there are: gpt"):
        get_model_family("gpt5")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_the_table_is_described_under_its_name(name: str) -> None:
    assert get_model_family(name).name == name
