"""Builds the GPT models whose logits and gradients were measured on the original."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

VOCABULARY, MAX_SEQUENCE = 128, 32


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS = {"silu": F.silu, "squared_relu": squared_relu, "gelu": F.gelu}


class GoldenCase:
    """One directory of figures: how the model was made, what went in, what came out."""

    def __init__(self, directory: Path):
        self.info = json.loads((directory / "info.json").read_text())
        self.weights = load_file(directory / self.info.get("weights_file", "weights.safetensors"))
        self.io = load_file(directory / "io.safetensors")

    def config(self, **overrides: Any) -> TransformerConfig:
        fields = {**self.info["config"], **overrides}
        fields["activation_func"] = ACTIVATIONS[fields.pop("activation", "gelu")]
        return (MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig)(**fields)

    def model(self, te_names: bool = False, **overrides: Any) -> GPTModel:
        model_parallel_cuda_manual_seed(1)
        config = self.config(**overrides)
        make = (
            gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
            if te_names
            else gpt_layer_specs.get_gpt_layer_local_spec
        )
        options = {
            "qk_layernorm": config.qk_layernorm,
            "multi_latent_attention": config.multi_latent_attention,
        }
        spec = make(**options)
        if config.num_moe_experts:
            spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, te_names)
        model = GPTModel(config, spec, VOCABULARY, MAX_SEQUENCE, **self.info["model"])
        weights = {self.te_name(name) if te_names else name: value for name, value in self.weights.items()}
        model.load_state_dict(weights, strict=True)
        return model.train()

    def te_name(self, name: str) -> str:
        keys = gpt_layer_specs.LOCAL_TO_TE_KEYS
        if self.info["config"].get("multi_latent_attention"):
            keys = gpt_layer_specs.LOCAL_TO_TE_KEYS_OF_LATENT_ATTENTION
        for local, te in keys.items():
            name = name.replace(f".{local}", f".{te}")
        return name

    def run(self, model: GPTModel, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [b, s, v], loss per token [b, s] and the masked mean, whose backward has run."""
        tokens, positions, labels = (self.io[name] for name in ("tokens", "position_ids", "labels"))
        with torch.no_grad():
            logits = model(tokens, positions, mask)
        per_token = model(tokens, positions, mask, labels=labels)
        loss_mask = self.io["loss_mask"].float()
        loss = (per_token * loss_mask).sum() / loss_mask.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        return logits, per_token.detach(), loss.detach()
