"""What language models share: the loss, and the tie between embedding and output layer."""

from typing import Any

import torch
from torch import Tensor

from megatron.core import accelerator, parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils.tensors import mark


class LanguageModule(MegatronModule):
    """Base of language models.

    Subclasses set ``pre_process``, ``post_process``, ``share_embeddings_and_output_weights``, ``embedding``,
    ``output_layer`` and, if they know them, ``fp16_lm_cross_entropy`` and ``mtp_process``: whether this stage
    predicts further tokens, and so has an embedding.
    """

    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    embedding: Any
    output_layer: Any
    fp16_lm_cross_entropy: bool = False
    mtp_process: bool = False

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
        """Marks embedding and output weights for the optimizer, and a weight that serves as both.

        An embedding that the last stage needs too, as its output weight or to predict further tokens, has a
        copy there: it starts as zeros and becomes the first by one sum over the embedding group, in which all
        its stages take part.
        """
        has_embedding = self.pre_process or self.mtp_process
        if has_embedding:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        tied = self.share_embeddings_and_output_weights
        if self.post_process and (self.mtp_process or (tied and has_embedding)):
            # Used several times, so gradients that went to main_grad directly must leave zeros for the sum
            # with the other uses'.
            weight = self._weight_with_copies() if tied else self.output_layer.weight
            assert weight is not None, "an output layer that is not tied has one"
            mark(weight, zero_out_wgrad=True)
        has_copies = tied or getattr(self.config, "mtp_num_layers", None)
        if has_copies and self.pre_process != self.post_process:
            self._tie_copies_on_other_stages()

    def _tie_copies_on_other_stages(self) -> None:
        weight = self._weight_with_copies()
        mark(weight, shared_embedding=True)
        if not self.pre_process:
            # A copy: norms and counts over the whole model leave it out.
            mark(weight, shared=True)
        if weight.is_meta or not parallel_state.model_parallel_is_initialized():
            return
        if not self.pre_process:
            weight.data.zero_()
        # Collectives may not take what was built on the CPU of a machine with another device.
        weight.data = weight.data.to(accelerator.current_device())
        if parallel_state.is_rank_in_embedding_group():
            torch.distributed.all_reduce(weight.data, group=parallel_state.get_embedding_group())

    def _weight_with_copies(self) -> torch.nn.Parameter:
        weight = self.shared_embedding_or_output_weight()
        assert weight is not None, "the first and the last stage have one"
        return weight

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter | None:
        """The weight with copies: the embedding's where there is one, else the output layer's.  [V, h]"""
        if self.pre_process or self.mtp_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None
