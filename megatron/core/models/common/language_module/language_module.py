"""What language models share: the loss, and the tie between embedding and output layer."""

from typing import Any

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule


class LanguageModule(MegatronModule):
    """Base of language models.

    Subclasses set ``pre_process``, ``post_process``, ``share_embeddings_and_output_weights``, ``embedding``,
    ``output_layer`` and, if they know it, ``fp16_lm_cross_entropy``.
    """

    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    embedding: Any
    output_layer: Any
    fp16_lm_cross_entropy: bool = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token loss.  labels: [b, s], logits: [s, b, v] -> [b, s], fp32.

        Sums are always fp32; ``fp16_lm_cross_entropy`` rounds the result to the precision of the logits.
        """
        # [b, s] -> [s, b]
        loss = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
        if self.fp16_lm_cross_entropy:
            loss = loss.to(logits.dtype)
        # [s, b] -> [b, s]
        return loss.transpose(0, 1).contiguous()

    def setup_embeddings_and_output_layer(self) -> None:
        """Marks embedding and output weights for the optimizer, and a weight that serves as both."""
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        if self.share_embeddings_and_output_weights and self.pre_process and self.post_process:
            # Used twice, so gradients that went to main_grad directly must leave zeros for the other use's
            # sum.
            self.shared_embedding_or_output_weight().zero_out_wgrad = True

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter | None:
        """The tied weight: the embedding's on the first stage, the output layer's on the last.  [V, h]"""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None
