"""Embedding of tokens, their positions, and the text they belong to."""

from typing import Literal

import torch
from torch import Tensor

from megatron.core import accelerator, tensor_parallel
from megatron.core.errors import DataError
from megatron.core.fusions.dropout import dropout
from megatron.core.fusions.embedding import embedding_lookup
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class _Table(torch.nn.Module):
    """A small embedding table that every rank holds whole.  weight: [rows, h]"""

    def __init__(self, config: TransformerConfig, rows: int):
        super().__init__()
        device = accelerator.build_device(config)
        weight = torch.empty(rows, config.hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization and not weight.is_meta:
            # From the default stream, so that tensor-parallel ranks draw the same.
            config.init_method(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]"""
        return embedding_lookup(ids, self.weight)


class LanguageModelEmbedding(MegatronModule):
    """Sum of word, learned position and token-type embeddings, and dropout.

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
        position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute",
        num_tokentypes: int = 0,
        scatter_to_sequence_parallel: bool = True,
    ):
        super().__init__(config)
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.add_position_embedding = position_embedding_type == "learned_absolute"
        self.num_tokentypes = num_tokentypes
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            vocab_size, config.hidden_size, init_method=config.init_method, config=config
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
                table.weight.shared = True

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, tokentype_ids: Tensor | None = None
    ) -> Tensor:
        """Token ids [b, s], positions [b, s], types [b, s] or None -> [s, b, h]."""
        embeddings = self.word_embeddings(input_ids)
        if self.position_embeddings is not None:
            embeddings = embeddings + self._positions(position_ids)
        if self.tokentype_embeddings is not None:
            assert tokentype_ids is not None, "this model has token types: pass tokentype_ids"
            embeddings = embeddings + self.tokentype_embeddings(tokentype_ids)
        # [b, s, h] -> [s, b, h]
        embeddings = embeddings.transpose(0, 1).contiguous()
        if self.config.fp32_residual_connection:
            embeddings = embeddings.float()
        if self.training and self.embedding_dropout_prob > 0.0:
            embeddings = dropout(embeddings, self.embedding_dropout_prob)
        return embeddings

    def _positions(self, position_ids: Tensor) -> Tensor:
        try:
            return self.position_embeddings(position_ids)
        except IndexError as error:
            raise DataError(
                f"position {int(position_ids.max())} is beyond the {self.max_sequence_length} learned "
                "positions: shorten the sequence, or raise --max-position-embeddings"
            ) from error
