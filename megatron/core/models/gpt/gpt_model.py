"""GPT: embedding, a stack of causal layers, an output layer over the vocabulary."""

from typing import Any, Literal

from torch import Tensor, is_grad_enabled

from megatron.core import tensor_parallel
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.enums import ModelType
from megatron.core.errors import ConfigError, NotBuiltYetError, UsageError
from megatron.core.fusions.fused_softmax import soft_cap
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

POSITION_EMBEDDING_TYPES = ("learned_absolute", "rope", "none")


class GPTModel(LanguageModule):
    """A decoder-only transformer.

    Attributes:
        embedding: word (and learned position) embedding, on the first stage, and where ``mtp`` is.
        rotary_pos_emb: table of angles, with rotary positions.
        decoder: the layers.
        mtp: layers that predict further tokens, on the last stage, if there are any.
        output_layer: projection to the vocabulary, on the last stage; without a weight of its own when tied.

    Args:
        config: model config.
        transformer_layer_spec: of one layer, or of the stack.
        vocab_size: rows of the embedding, padding included.
        max_sequence_length: longest sequence; rows of a learned position table.
        pre_process: this is the first stage.
        post_process: this is the last stage.
        fp16_lm_cross_entropy: return the loss in half precision.
        parallel_output: leave logits split over tensor-parallel ranks; the loss is the same either way.
        share_embeddings_and_output_weights: tie the output layer to the embedding.
        position_embedding_type: ``learned_absolute``, ``rope`` or ``none``.
        rotary_percent, rotary_base, rope_scaling, rope_scaling_factor, seq_len_interpolation_factor: see
            :class:`RotaryEmbedding`.
        scatter_embedding_sequence_parallel: ``embedding`` splits its output under sequence parallelism;
            otherwise it gives the whole to code that changes it, and forward splits what it made itself.
        mtp_block_spec: of layers that predict further tokens, on the last stage; None on the others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec | TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: Literal["learned_absolute", "rope", "mrope", "none"] = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: int = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        scatter_embedding_sequence_parallel: bool = True,
        seq_len_interpolation_factor: float | None = None,
        mtp_block_spec: MultiTokenPredictionBlockSubmodules | ModuleSpec | None = None,
    ):
        super().__init__(config)
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals(), prefix=type(self).__name__)
        _check_supported(config, position_embedding_type)
        _check_further_tokens(config, position_embedding_type, mtp_block_spec, post_process)
        self.transformer_layer_spec = transformer_layer_spec
        self.vocab_size = vocab_size
        self.max_sequence_length = self.max_position_embeddings = max_sequence_length
        self.pre_process, self.post_process = pre_process, post_process
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.rotary_percent, self.rotary_base = rotary_percent, rotary_base
        self.rotary_scaling = rope_scaling
        self.model_type = ModelType.encoder_or_decoder
        self.mtp_process = mtp_block_spec is not None

        if pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                max_sequence_length,
                position_embedding_type,
                scatter_to_sequence_parallel=scatter_embedding_sequence_parallel,
            )
        self.rotary_pos_emb = None
        # Latent attention makes its own angles.
        if position_embedding_type == "rope" and not config.multi_latent_attention:
            assert config.kv_channels is not None, "the config fills it in"
            self.rotary_pos_emb = RotaryEmbedding(
                config.kv_channels,
                rotary_percent,
                config.rotary_interleaved,
                seq_len_interpolation_factor,
                rotary_base,
                rope_scaling,
                rope_scaling_factor,
                config.use_cpu_initialization,
            )
        self.decoder = TransformerBlock(
            config, transformer_layer_spec, pre_process=pre_process, post_process=post_process
        )
        if mtp_block_spec is not None:
            self.mtp = MultiTokenPredictionBlock(config, mtp_block_spec)
        if post_process:
            with tensor_parallel.weight_scope("output"):
                self.output_layer = tensor_parallel.ColumnParallelLinear(
                    config.hidden_size,
                    vocab_size,
                    config=config,
                    init_method=config.init_method,
                    bias=False,
                    skip_bias_add=False,
                    gather_output=not parallel_output,
                    skip_weight_param_allocation=share_embeddings_and_output_weights
                    and (pre_process or self.mtp_process),
                )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hands in the previous stage's activations: a tensor [s, b, h], or a list of one."""
        if isinstance(input_tensor, list):
            if len(input_tensor) != 1:
                raise UsageError(f"GPT takes one input tensor, not {len(input_tensor)}")
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: InferenceParams | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
        *,
        inference_params: InferenceParams | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss per token, logits, or hidden states.

        Args:
            input_ids: [b, s].
            position_ids: [b, s]; read with learned positions only.
            attention_mask: bool [b or 1, 1, s, s], True hides, in addition to causality; or None.
            decoder_input: [s, b, h], or this rank's part [s/TP, b, h] under sequence parallelism, used
                instead of the embedding.
            labels: [b, s] target ids, or None.
            loss_mask: for layers that predict further tokens; the loss returned here is never masked.

        Returns:
            [b, s] loss with labels, [b, s, v] logits without, [s, b, h] on a stage that is not the last.
        """
        if decoder_input is None and self.pre_process:
            decoder_input = self._embed(input_ids, position_ids)
        angles = None
        if self.rotary_pos_emb is not None:
            length = self.rotary_pos_emb.get_rotary_seq_len(
                inference_context, self.decoder, decoder_input, self.config, packed_seq_params
            )
            is_packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
            angles = self.rotary_pos_emb(length, packed_seq=is_packed)
        norms_first = not self.mtp_process or self.config.mtp_after_norm
        hidden_states = self.decoder(
            decoder_input,
            attention_mask,
            rotary_pos_emb=angles,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
            inference_params=inference_params,
            apply_final_norm=norms_first,
            **(extra_block_kwargs or {}),
        )
        if not self.post_process:
            return hidden_states
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        # An evaluation has no use for losses that only make gradients.
        if self.mtp_process and labels is not None and is_grad_enabled():
            hidden_states = self.mtp(
                input_ids,
                position_ids,
                hidden_states,
                attention_mask,
                labels=labels,
                rotary_pos_emb=angles,
                packed_seq_params=packed_seq_params,
                extra_block_kwargs=extra_block_kwargs,
                loss_mask=loss_mask,
                embedding=self._embed,
                output_layer=self.output_layer,
                output_weight=weight,
                compute_language_model_loss=self.compute_language_model_loss,
            )
        if not norms_first:
            assert self.decoder.final_layernorm is not None, "the last stage has one"
            hidden_states = self.decoder.final_layernorm(hidden_states)
        if labels is not None:
            # The loss is made of logits that are split over ranks, whoever wants them whole otherwise.
            runtime_gather_output = False
        logits, _ = self.output_layer(hidden_states, weight, runtime_gather_output)
        logits = _scaled_and_capped(logits, self.config)
        if labels is None:
            # [s, b, v] -> [b, s, v]
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def _embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """[b, s] -> [s, b, h], or [s/TP, b, h] under sequence parallelism."""
        embedded = self.embedding(input_ids, position_ids)
        if self.config.sequence_parallel and not self.embedding.scatter_to_sequence_parallel:
            return tensor_parallel.scatter_to_sequence_parallel_region(embedded)
        return embedded


def _scaled_and_capped(logits: Tensor, config: TransformerConfig) -> Tensor:
    """Logits times their factor, then bounded.  [s, b, v] -> [s, b, v]"""
    if config.output_multiplier_scale is not None:
        logits = logits * config.output_multiplier_scale
    cap = config.output_logit_softcapping
    return logits if cap is None else soft_cap(logits, cap)


def _check_supported(config: TransformerConfig, position_embedding_type: str) -> None:
    if position_embedding_type == "mrope":
        raise NotBuiltYetError("multimodal rotary embedding", "position_embedding_type mrope", "Use rope.")
    if position_embedding_type not in POSITION_EMBEDDING_TYPES:
        raise ConfigError(
            f"position_embedding_type: {position_embedding_type!r} is not one of "
            f"{', '.join(POSITION_EMBEDDING_TYPES)}"
        )


def _check_further_tokens(
    config: TransformerConfig, position_embedding_type: str, spec: Any, post_process: bool
) -> None:
    depths = config.mtp_num_layers or 0
    built = 0 if spec is None else len(getattr(spec, "submodules", spec).layer_specs or ())
    # The first stage prepares its embedding for a copy on the last one; both must know.
    if built != (depths if post_process else 0):
        raise ConfigError(
            f"mtp_block_spec has {built} layers on a stage that should have "
            f"{depths if post_process else 0}, because of mtp_num_layers {config.mtp_num_layers}: pass "
            "get_gpt_mtp_block_spec(config, transformer_layer_spec, ...)"
        )
    if depths and position_embedding_type not in ("rope", "none"):
        raise ConfigError(
            f"position_embedding_type {position_embedding_type} with mtp_num_layers {depths}: positions of "
            "further tokens are not learned; use rope or none"
        )
