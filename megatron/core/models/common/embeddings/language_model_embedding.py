"""Embedding of tokens, their positions, and the text they belong to."""

import contextlib
from typing import Literal

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.errors import DataError, UsageError
from megatron.core.fusions.embeddings import embedding_lookup
from megatron.core.fusions.fused_bias_dropout import dropout
from megatron.core.tensor_parallel.initial_weights import Place, new_weight
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark


class _Table(torch.nn.Module):
    """A small embedding table that every rank holds whole.  weight: [rows, h]"""

    def __init__(self, config: TransformerConfig, rows: int):
        super().__init__()
        assert config.init_method is not None, "the config fills it in"
        self.weight, _ = new_weight(config, (rows, config.hidden_size), None, config.init_method, Place(0, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]"""
        return embedding_lookup(ids, self.weight)


class LanguageModelEmbedding(MegatronModule):
    """Sum of word embeddings, times a factor of the config, learned positions and token types; and dropout.

    Args:
        config: model config.
        vocab_size: rows of the word table.
        max_sequence_length: rows of the position table.
        position_embedding_type: ``learned_absolute`` adds one; ``rope`` and ``none`` do not.
        num_tokentypes: rows of the token-type table, 0 for none.
        scatter_to_sequence_parallel: split the output along the sequence under sequence parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: Literal["learned_absolute", "rope", "mrope", "none"] = "learned_absolute",
        num_tokentypes: int = 0,
        scatter_to_sequence_parallel: bool = True,
    ):
        super().__init__(config)
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.add_position_embedding = position_embedding_type == "learned_absolute"
        self.num_tokentypes = num_tokentypes
        self.scatter_to_sequence_parallel = config.sequence_parallel and scatter_to_sequence_parallel
        # What every rank adds to the whole sequence must be added before it is cut.
        self.reduce_scatter_embeddings = (
            self.scatter_to_sequence_parallel and not self.add_position_embedding and num_tokentypes <= 0
        )
        with tensor_parallel.weight_scope("embedding"):
            self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
                vocab_size,
                config.hidden_size,
                init_method=config.init_method,
                reduce_scatter_embeddings=self.reduce_scatter_embeddings,
                config=config,
            )
            self.position_embeddings = (
                _Table(config, max_sequence_length) if self.add_position_embedding else None
            )
            self.tokentype_embeddings = _Table(config, num_tokentypes) if num_tokentypes > 0 else None
        self.embedding_dropout_prob = config.hidden_dropout

    def zero_parameters(self) -> None:
        """Zeroes all tables and marks them as copies of another stage's."""
        for table in (self.word_embeddings, self.position_embeddings, self.tokentype_embeddings):
            if table is not None:
                torch.nn.init.zeros_(table.weight)
                mark(table.weight, shared=True)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, tokentype_ids: Tensor | None = None
    ) -> Tensor:
        """Token ids [b, s], positions [b, s], types [b, s] or None -> [s, b, h], or [s/TP, b, h]."""
        embeddings = self.word_embeddings(input_ids)
        if self.config.embedding_multiplier_scale != 1.0:
            embeddings = embeddings * self.config.embedding_multiplier_scale
        if self.position_embeddings is not None:
            if position_ids is None:
                raise UsageError("this model has learned positions: pass position_ids")
            embeddings = embeddings + self._positions(self.position_embeddings, position_ids)
        if self.tokentype_embeddings is not None:
            if tokentype_ids is None:
                raise UsageError("this model has token types: pass tokentype_ids")
            embeddings = embeddings + self.tokentype_embeddings(tokentype_ids)
        if not self.reduce_scatter_embeddings:
            embeddings = self._sequence_first(embeddings)
        if self.config.fp32_residual_connection:
            embeddings = embeddings.float()
        if self.training and self.embedding_dropout_prob > 0.0:
            with self._random_stream():
                embeddings = dropout(embeddings, self.embedding_dropout_prob)
        return embeddings

    def _sequence_first(self, embeddings: Tensor) -> Tensor:
        """[b, s, h] -> [s, b, h], or [s/TP, b, h] under sequence parallelism."""
        embeddings = embeddings.transpose(0, 1).contiguous()
        if not self.scatter_to_sequence_parallel:
            return embeddings
        part = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        # The part is a view that keeps the whole alive.
        return part.clone() if self.config.clone_scatter_output_in_embedding else part

    def _random_stream(self) -> contextlib.AbstractContextManager[None]:
        """Ranks with different parts of a sequence drop different elements, those with the whole the same."""
        if self.scatter_to_sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def _positions(self, table: _Table, position_ids: Tensor) -> Tensor:
        try:
            return table(position_ids)
        except IndexError as error:
            raise DataError(
                f"position {int(position_ids.max())} is beyond the {self.max_sequence_length} learned "
                "positions: shorten the sequence, or raise max_position_embeddings"
            ) from error
