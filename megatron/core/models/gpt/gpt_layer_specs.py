"""Which modules a GPT layer is made of."""

import warnings
from functools import partial

from megatron.core.errors import ConfigError
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.pipeline_layout import get_num_layers_to_build, get_transformer_layer_offset
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig, moe_layer_pattern
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

# Distributed checkpoints of the local layout carry the names of the TransformerEngine layout.
LOCAL_TO_TE_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
LOCAL_TO_TE_KEYS_OF_LATENT_ATTENTION = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def get_gpt_layer_with_transformer_engine_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    qk_layernorm: bool | None = False,
    multi_latent_attention: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
    qk_l2_norm: bool | None = False,
    post_norm: bool = False,
) -> ModuleSpec:
    """A layer with TransformerEngine's parameter names: each norm lives in the linear layer after it.

    The modules are this package's own and run on any device. Norms of the outputs of attention and MLP
    (``post_norm``) have no linear layer after them and stand alone.
    """
    _warn_about_fp8(fp8)
    mlp = get_mlp_module_spec(True, num_experts, moe_grouped_gemm, None, moe_use_legacy_grouped_gemm)
    # Router and experts share the norm's output, so it cannot be part of a linear layer.
    norms = {} if num_experts is None else {"pre_mlp_layernorm": TENorm}
    norms |= _post_norms(TENorm, post_norm)
    if multi_latent_attention:
        # The norm of a latent is part of the projection after it; that of the input stands alone.
        up = TELayerNormColumnParallelLinear if qk_layernorm else TEColumnParallelLinear
        return _layer(
            attention=MLASelfAttentionSubmodules(
                linear_q_proj=TEColumnParallelLinear,
                linear_q_down_proj=TELinear,
                linear_q_up_proj=up,
                linear_kv_down_proj=TELinear,
                linear_kv_up_proj=up,
                core_attention=TEDotProductAttention,
                linear_proj=TERowParallelLinear,
            ),
            mlp=mlp,
            norms={"input_layernorm": TENorm, **norms},
        )
    return _layer(
        attention=SelfAttentionSubmodules(
            linear_qkv=TELayerNormColumnParallelLinear,
            core_attention=TEDotProductAttention,
            linear_proj=TERowParallelLinear,
            **_head_norms(TENorm, qk_layernorm, qk_l2_norm),
        ),
        mlp=mlp,
        norms=norms,
    )


def get_gpt_layer_local_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    qk_layernorm: bool | None = False,
    multi_latent_attention: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
    normalization: str | None = None,
    qk_l2_norm: bool | None = False,
    post_norm: bool = False,
) -> ModuleSpec:
    """A layer with separate norms; ``config.normalization`` chooses their kind, not the argument."""
    _warn_about_fp8(fp8)
    if multi_latent_attention:
        norm = WrappedTorchNorm if qk_layernorm else None
        attention: SelfAttentionSubmodules | MLASelfAttentionSubmodules = MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            kv_layernorm=norm,
        )
    else:
        attention = SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            **_head_norms(WrappedTorchNorm, qk_layernorm, qk_l2_norm),
        )
    return _layer(
        attention=attention,
        mlp=get_mlp_module_spec(False, num_experts, moe_grouped_gemm, None, moe_use_legacy_grouped_gemm),
        norms={
            "input_layernorm": WrappedTorchNorm,
            "pre_mlp_layernorm": WrappedTorchNorm,
            **_post_norms(WrappedTorchNorm, post_norm),
            "sharded_state_dict_keys_map": dict(
                LOCAL_TO_TE_KEYS_OF_LATENT_ATTENTION if multi_latent_attention else LOCAL_TO_TE_KEYS
            ),
        },
    )


def get_mlp_module_spec(
    use_te: bool | None = True,
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
) -> ModuleSpec:
    """A dense MLP, with its norm inside fc1 if ``use_te``; with ``num_experts``, a mixture of experts."""
    _warn_about_fp8(fp8)
    if num_experts is not None:
        return get_moe_module_spec(use_te, num_experts, moe_grouped_gemm, moe_use_legacy_grouped_gemm)
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=TELayerNormColumnParallelLinear if use_te else ColumnParallelLinear,
            linear_fc2=TERowParallelLinear if use_te else RowParallelLinear,
        ),
    )


def _layer(
    attention: SelfAttentionSubmodules | MLASelfAttentionSubmodules, mlp: ModuleSpec, norms: dict
) -> ModuleSpec:
    is_latent = isinstance(attention, MLASelfAttentionSubmodules)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=MLASelfAttention if is_latent else SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            **norms,
        ),
    )


def _head_norms(norm: type, qk_layernorm: bool | None, qk_l2_norm: bool | None) -> dict[str, type]:
    chosen = L2Norm if qk_l2_norm else norm if qk_layernorm else None
    return {} if chosen is None else {"q_layernorm": chosen, "k_layernorm": chosen}


def _post_norms(norm: type, post_norm: bool) -> dict[str, type]:
    return {"post_attn_norm": norm, "post_mlp_layernorm": norm} if post_norm else {}


def _warn_about_fp8(fp8: str | None) -> None:
    # Launch scripts pass an unrelated flag's False in this position.
    if fp8:
        warnings.warn(f"the fp8 argument of layer specs ({fp8!r}) has no effect", DeprecationWarning)


def get_gpt_decoder_block_spec(
    config: TransformerConfig,
    use_transformer_engine: bool,
    normalization: str | None = None,
    qk_l2_norm: bool | None = False,
) -> TransformerBlockSubmodules:
    """Specs of all layers of this stage, dense or with experts by ``moe_layer_freq``, and the final norm."""
    common = {
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
        "qk_l2_norm": qk_l2_norm,
        "post_norm": config.post_norm,
    }
    experts = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "moe_use_legacy_grouped_gemm": config.moe_use_legacy_grouped_gemm,
    }
    make = (
        get_gpt_layer_with_transformer_engine_spec
        if use_transformer_engine
        else partial(get_gpt_layer_local_spec, normalization=normalization)
    )
    kinds = {False: make(**common), True: make(**common, **experts)}
    first = get_transformer_layer_offset(config)
    pattern = moe_layer_pattern(config)[first : first + get_num_layers_to_build(config)]
    norm = TENorm if use_transformer_engine else WrappedTorchNorm
    return TransformerBlockSubmodules([kinds[has_experts] for has_experts in pattern], norm)


def get_gpt_mtp_block_spec(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules | ModuleSpec,
    use_transformer_engine: bool,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Layers that predict further tokens, each like the last layer of ``spec``; None on stages without any.

    Args:
        config: model config; ``mtp_num_layers`` says how many there are.
        spec: of one layer, of a block, or of all layers of this stage.
        use_transformer_engine: have TransformerEngine's parameter names.

    Raises:
        ConfigError: the last stage has no layer to copy.
    """
    count = get_mtp_num_layers_to_build(config)
    if not count:
        return None
    layers = spec if isinstance(spec, TransformerBlockSubmodules) else spec.submodules
    layer = spec
    if isinstance(layers, TransformerBlockSubmodules):
        if not layers.layer_specs:
            raise ConfigError(
                f"mtp_num_layers {config.mtp_num_layers}: the last stage has no layer that these could be "
                "like; give it one"
            )
        layer = layers.layer_specs[-1]
    assert isinstance(layer, ModuleSpec)
    return MultiTokenPredictionBlockSubmodules([get_mtp_layer_spec(layer, use_transformer_engine)] * count)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _get_mlp_module_spec(
    use_te: bool | None = True,
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    fp8: str | None = None,
    moe_use_legacy_grouped_gemm: bool | None = False,
) -> ModuleSpec:
    """Older name of :func:`get_mlp_module_spec`."""
    warnings.warn("_get_mlp_module_spec() is now get_mlp_module_spec()", DeprecationWarning, stacklevel=2)
    return get_mlp_module_spec(use_te, num_experts, moe_grouped_gemm, fp8, moe_use_legacy_grouped_gemm)
