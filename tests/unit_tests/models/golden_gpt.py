"""Builds the GPT models whose logits and gradients were measured on the original."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.family import layer_spec
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
        spec = layer_spec(config, te_names)
        further = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, te_names)
        model = GPTModel(config, spec, VOCABULARY, MAX_SEQUENCE, mtp_block_spec=further, **self.info["model"])
        weights = {self.te_name(name) if te_names else name: value for name, value in self.weights.items()}
        model.load_state_dict(weights, strict=True)
        return model.train()

    def te_name(self, name: str) -> str:
        keys = gpt_layer_specs.LOCAL_TO_TE_KEYS
        if self.info["config"].get("multi_latent_attention"):
            keys = gpt_layer_specs.LOCAL_TO_TE_KEYS_OF_LATENT_ATTENTION
        if ".mlp.router." in "".join(self._of_layer(name)):
            keys = {local: te for local, te in keys.items() if local != "pre_mlp_layernorm."}
        for local, te in keys.items():
            name = name.replace(f".{local}", f".{te}")
        return name

    def _of_layer(self, name: str) -> list[str]:
        """The names of all parameters of the same layer."""
        layer = ".".join(name.split(".")[:3]) + "."
        return [each for each in self.weights if each.startswith(layer)]

    def run(self, model: GPTModel, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [b, s, v], loss per token [b, s] and the masked mean, whose backward has run."""
        tokens, positions, labels = (self.io[name] for name in ("tokens", "position_ids", "labels"))
        with torch.no_grad():
            logits = model(tokens, positions, mask)
        loss_mask = self.io["loss_mask"].float()
        per_token = model(tokens, positions, mask, labels=labels, loss_mask=loss_mask)
        loss = (per_token * loss_mask).sum() / loss_mask.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        return logits, per_token.detach(), loss.detach()


def check(golden: Path, name: str, **overrides: Any) -> "GoldenCase":
    """Logits, losses and the gradient of every parameter are those of the case."""
    case = GoldenCase(golden / "model" / name)
    te_names = overrides.pop("te_names", False)
    mask = overrides.pop("mask", None)
    model = case.model(te_names, **overrides)
    logits, per_token, loss = case.run(model, mask)
    torch.testing.assert_close(logits, case.io["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(per_token, case.io["loss_per_token"], atol=1e-5, rtol=0)
    assert float(loss) == pytest.approx(case.info["loss"], abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    rename = case.te_name if te_names else str
    assert gradients.keys() == {rename(name) for name in case.info["grad_norm"]}
    for parameter, norm in case.info["grad_norm"].items():
        gradient = gradients[rename(parameter)].double()
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-5), parameter
        # A sum of n elements of either sign: rounding is measured by the norm.
        tolerance = 1e-5 * norm * gradient.numel() ** 0.5
        assert float(gradient.sum()) == pytest.approx(case.info["grad_sum"][parameter], abs=tolerance), (
            parameter
        )
    return case
