"""Whole tensors out of the pieces that ranks hold, under the names of a model on one rank."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
# A parameter of one expert, alone or beside others; and the parameters of all experts of a rank.
_ONE_EXPERT = re.compile(r"(.*\.experts\.)local_experts\.(\d+)(\..*)")
_BESIDE_OTHERS = re.compile(r"(.*\.experts\.)(linear_fc[12]\.weight)(\d+)")
_ALL_EXPERTS = re.compile(r"(.*\.experts\.)weight([12])")


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor.

    Attributes:
        tensor: the values.
        part, parts: which of how many tensor-parallel parts it is; 0 of 1 for a tensor that is not cut.
        dim: the dimension that is cut.
        stride: blocks that are cut one by one; 2 where a rank holds its part of a gate above its part of the
            other half.
    """

    tensor: Tensor
    part: int = 0
    parts: int = 1
    dim: int = 0
    stride: int = 1


def piece_of(param: nn.Parameter, value: Tensor, tp_rank: int, tp_size: int) -> Piece:
    """``value`` (the parameter, or something of its shape) as a piece, by the parameter's own attributes."""
    if tp_size == 1 or not getattr(param, "tensor_model_parallel", False):
        return Piece(value)
    return Piece(value, tp_rank, tp_size, param.partition_dim, param.partition_stride)


@dataclass(frozen=True)
class Experts:
    """Where a rank's experts are among all.

    Attributes:
        ep_rank, ep_size: of expert parallelism.
        part, parts: of expert tensor parallelism.
        count: experts of a layer.
        gated: the first weight holds a gate and the other half.
    """

    ep_rank: int
    ep_size: int
    part: int
    parts: int
    count: int
    gated: bool

    def pieces(self, name: str, param: nn.Parameter, value: Tensor) -> dict[str, Piece] | None:
        """Pieces of the experts that a parameter holds; None for other parameters.

        However weights are laid out, their names are those of one MLP after the other, numbered over all
        ranks, and their shapes [out, in].
        """
        local = self.count // self.ep_size
        first = self.ep_rank * local
        if match := _ONE_EXPERT.fullmatch(name):
            before, index, after = match.groups()
            piece = piece_of(param, value, self.part, self.parts)
            return {f"{before}{first + int(index)}{after}": piece}
        if match := _BESIDE_OTHERS.fullmatch(name):
            before, after, index = match.groups()
            piece = piece_of(param, value, self.part, self.parts)
            return {f"{before}{first + int(index)}.{after}": piece}
        if match := _ALL_EXPERTS.fullmatch(name):
            before, number = match.groups()
            is_first = number == "1"
            # [h, experts * f] or [experts * f, h]; in memory expert by expert
            rows = value.shape[0] if is_first else value.shape[0] // local
            stride = 2 if is_first and self.gated else 1
            return {
                f"{before}{first + i}.linear_fc{number}.weight": Piece(
                    block.t(), self.part, self.parts, int(not is_first), stride
                )
                for i, block in enumerate(value.reshape(local, rows, -1))
            }
        return None


def join(pieces: Iterable[Piece]) -> Tensor:
    """The whole tensor; needs each part exactly once."""
    pieces = sorted(pieces, key=lambda piece: piece.part)
    first = pieces[0]
    assert [piece.part for piece in pieces] == list(range(first.parts)), [piece.part for piece in pieces]
    blocks = [piece.tensor.chunk(first.stride, dim=first.dim) for piece in pieces]
    return torch.cat([block[i] for i in range(first.stride) for block in blocks], dim=first.dim)


def global_names(model: nn.Module, tied: bool) -> dict[str, str]:
    """Name of each parameter of a pipeline stage -> its name in the whole model.

    Stages number their layers from 0; the copy of a tied embedding that the last stage holds stands for the
    embedding.
    """
    names = {}
    for name, _ in model.named_parameters():
        match = _LAYER.fullmatch(name)
        if match:
            before, index, after = match.groups()
            number = model.get_submodule(before.rstrip("."))[int(index)].layer_number - 1
            names[name] = f"{before}{number}{after}"
        elif tied and name == "output_layer.weight":
            names[name] = "embedding.word_embeddings.weight"
        else:
            names[name] = name
    return names


def assemble(holdings: Iterable[dict[str, Piece]]) -> dict[str, list[Tensor]]:
    """Every whole tensor that can be made from what the ranks hold, replicas included.

    Args:
        holdings: per rank, name -> piece; ranks that differ in data-parallel or context-parallel place only
            hold replicas.

    Returns:
        name -> one whole tensor per set of replicas: the k-th is made of the k-th holder of each part.
    """
    holders: dict[str, dict[int, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for held in holdings:
        for name, piece in held.items():
            holders[name][piece.part].append(piece)
    whole = {}
    for name, parts in holders.items():
        whole[name] = [join(pieces) for pieces in zip(*parts.values(), strict=True)]
    return whole
