"""The config of a transformer: its fields, what follows from them, and what they must not say."""

from dataclasses import dataclass

from megatron.core.errors import ConfigError
from megatron.core.transformer.config_fields import TransformerFields, moe_layer_pattern  # noqa: F401
from megatron.core.transformer.config_rules import Rules, broken, refuse_unbuilt, transformer_problems
from megatron.core.transformer.enums import AttnBackend  # noqa: F401  (annotations are looked up here)
from megatron.core.utils import init_method_normal, scaled_init_method_normal

ROPE_TYPES = ("rope", "yarn")


@dataclass
class TransformerConfig(TransformerFields):
    """All hyper-parameters of a model.  Unset values are derived, then all rules are checked at once.

    Raises:
        ConfigError: settings that contradict each other; the message lists every one with a way out.
        NotBuiltYetError: a setting whose code does not exist: the model would not be what was asked for.
    """

    def __post_init__(self) -> None:
        refuse_unbuilt(self)
        super().__post_init__()

    def _derive(self) -> None:
        super()._derive()
        self._derive_shapes()
        self._derive_initialisers()
        if self.apply_query_key_layer_scaling:
            # Scores divided by the layer number are multiplied back inside the softmax, which overflows fp16.
            self.attention_softmax_in_fp32 = True
        if self.recompute_modules is None:
            self.recompute_modules = ["core_attn"]
        if self.moe_layer_recompute and self.recompute_granularity != "full":
            self.recompute_granularity = "selective"
            if "moe" not in self.recompute_modules:
                self.recompute_modules = [*self.recompute_modules, "moe"]
        if self.window_size is not None:
            # Whether it has two entries is for the rules to say.
            self.window_size = tuple(self.window_size)  # pyright: ignore[reportAttributeAccessIssue]
        self._derive_moe()

    def _derive_shapes(self) -> None:
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.kv_channels is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}: change one of them, or set kv_channels to the width "
                    "of a head"
                )
            self.kv_channels = self.hidden_size // self.num_attention_heads

    def _derive_initialisers(self) -> None:
        if self.init_method is None:
            self.init_method = init_method_normal(self.init_method_std)
        if self.output_layer_init_method is None:
            self.output_layer_init_method = scaled_init_method_normal(
                self.init_method_std, max(self.num_layers, 1), multiplier=2.0
            )

    def _derive_moe(self) -> None:
        if self.num_moe_experts is not None and self.moe_ffn_hidden_size is None:
            self.moe_ffn_hidden_size = self.ffn_hidden_size
        if self.moe_expert_capacity_factor is not None and self.moe_expert_capacity_factor < 0:
            self.moe_expert_capacity_factor = None
        if self.moe_router_topk_limited_devices is not None and self.moe_router_group_topk is None:
            self.moe_router_group_topk = self.moe_router_topk_limited_devices
            self.moe_router_num_groups = self.expert_model_parallel_size

    def _problems(self) -> list[str]:
        problems = super()._problems() + transformer_problems(self)
        if self.multi_latent_attention and not isinstance(self, MLATransformerConfig):
            problems.append(
                "multi_latent_attention: its sizes are fields of MLATransformerConfig; use that class"
            )
        return problems


@dataclass
class MLATransformerConfig(TransformerConfig):
    """Adds the sizes of multi-head latent attention (DeepSeek-V2, section 2.1)."""

    multi_latent_attention: bool = True  # DeepSeek style low-rank attention
    q_lora_rank: int | None = 512  # None: queries are not compressed; rank of the query compression
    kv_lora_rank: int = 512  # rank of the key/value compression
    qk_head_dim: int = 128  # non-rotary head width
    qk_pos_emb_head_dim: int = 64  # rotary head width
    v_head_dim: int = 128  # value head width
    normalization: str = "RMSNorm"  # LayerNorm or RMSNorm
    rope_type: str = "yarn"  # 'rope' or 'yarn'
    rotary_base: float = 10000  # rotary base frequency
    rotary_percent: float = 1.0  # share of head width that is rotated
    rotary_scaling_factor: float = 40  # YaRN factor
    max_position_embeddings: int = 4096  # YaRN original context length
    beta_fast: float = 32  # YaRN fast bound
    beta_slow: float = 1  # YaRN slow bound
    mscale: float = 0.707  # YaRN magnitude scale
    mscale_all_dim: float = 0.707  # YaRN magnitude scale over all dims

    def _problems(self) -> list[str]:
        return super()._problems() + broken(self._latent_rules())

    def _latent_rules(self) -> Rules:
        yield (
            self.rope_type not in ROPE_TYPES,
            f"rope_type: {self.rope_type!r} is not one of {', '.join(ROPE_TYPES)}",
        )
        turned = self.qk_pos_emb_head_dim
        yield (
            turned < 2 or turned % 2,
            f"qk_pos_emb_head_dim {turned}: rotated channels come in pairs; use an even number",
        )
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim"):
            size = getattr(self, name)
            yield size is not None and size < 1, f"{name} {size}: it must be at least 1"
        yield (
            self.rotary_scaling_factor <= 0,
            f"rotary_scaling_factor {self.rotary_scaling_factor}: it must be positive; 1 scales nothing",
        )
