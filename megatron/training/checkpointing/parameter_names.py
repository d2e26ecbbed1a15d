"""Parameter names of the two implementations of a layer, and the row order of old attention weights.

The plain layer keeps its norms beside attention and MLP; the fused one keeps each inside the projection that
follows it. Both have the same weights.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

from megatron.core.errors import CheckpointError

# (plain layer, fused layer), as parts of a parameter name
_NORM_NAMES = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
_EXTRA_STATE = "_extra_state"
# Old models stored the rotary frequencies, which are computed.
_NOT_PARAMETERS = ("rotary_pos_emb.inv_freq",)


def rename_to(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """For each stored name the name that the current model uses; unchanged where there is no better one."""
    stored, wanted = list(stored), set(wanted)
    renamed = {}
    for name in stored:
        candidates = [name, *_other_spellings(name)]
        renamed[name] = next((candidate for candidate in candidates if candidate in wanted), name)
    return renamed


def _other_spellings(name: str) -> list[str]:
    spellings = []
    for plain, fused in _NORM_NAMES:
        for old, new in ((plain, fused), (fused, plain)):
            if old in name:
                spellings.append(name.replace(old, new))
    return spellings


def fit_model_state(
    stored: dict[str, Any], wanted: dict[str, Any]
) -> tuple[OrderedDict[str, Any], dict[str, str]]:
    """Rename a checkpoint's model state to the names of the current model.

    ``_extra_state`` entries hold the scaling factors of 8-bit layers. A model without them gets None,
    whatever the checkpoint has.

    Args:
        stored: model state of the checkpoint.
        wanted: state dict of the current model.

    Returns:
        the state, and the new name of every stored parameter whose name differs.
    """
    parameters = {
        name: value
        for name, value in stored.items()
        if not name.endswith(_EXTRA_STATE) and not name.endswith(_NOT_PARAMETERS)
    }
    table = rename_to(parameters, wanted)
    fitted = OrderedDict((table[name], value) for name, value in parameters.items())
    for name, value in wanted.items():
        if name.endswith(_EXTRA_STATE):
            fitted[name] = None if value is None else stored.get(name)
    return fitted, {old: new for old, new in table.items() if old != new}


def differences(stored: dict[str, Any], wanted: dict[str, Any], strict: bool = True) -> list[str]:
    """Readable list of what keeps ``stored`` from fitting a model with the state ``wanted``."""
    problems = []
    if strict:
        problems += _listed("not in the checkpoint", [name for name in wanted if name not in stored])
        problems += _listed("not in this model", [name for name in stored if name not in wanted])
    shapes = []
    for name, value in stored.items():
        other = wanted.get(name)
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and value.shape != other.shape:
            shapes.append(f"{name} is {list(value.shape)} in the checkpoint and {list(other.shape)} here")
    return problems + _listed("of another shape", shapes)


def _listed(title: str, items: list[str], most: int = 6) -> list[str]:
    if not items:
        return []
    more = f"\n    ... and {len(items) - most} more" if len(items) > most else ""
    return [f"  {title} ({len(items)}):\n    " + "\n    ".join(items[:most]) + more]


def fix_query_key_value_ordering(
    model: torch.nn.Module | list[torch.nn.Module], checkpoint_version: float
) -> None:
    """Reorder the rows of fused projections that were loaded from a checkpoint older than version 2.

    Version 0 stored [parts, heads, d], version 1 [heads, d, parts], today it is [heads, parts, d], with
    parts = 3 for query-key-value and 2 for key-value projections. Such checkpoints know no query groups.
    """
    if checkpoint_version >= 2.0:
        return
    if checkpoint_version not in (0, 1.0):
        raise CheckpointError(
            f"checkpoint version {checkpoint_version} is not known: it must be 0, 1 or 2 and above"
        )
    for chunk in model if isinstance(model, list) else [model]:
        for module_name, module in chunk.named_modules():
            parts = {"linear_qkv": 3, "linear_kv": 2}.get(module_name.rsplit(".", 1)[-1])
            if parts is None:
                continue
            head_dim = _head_dim(chunk)
            for param in module.parameters(recurse=False):
                param.data.copy_(reorder_rows(param.data, parts, head_dim, checkpoint_version))


def _head_dim(chunk: Any) -> int:
    return chunk.config.kv_channels


def reorder_rows(rows: torch.Tensor, parts: int, head_dim: int, version: float) -> torch.Tensor:
    """Rows of a fused projection from the order of version 0 or 1 to [heads, parts, head_dim]."""
    heads = rows.shape[0] // (parts * head_dim)
    rest = rows.shape[1:]
    if version == 0:
        # [parts * n * d, ...] -> [parts, n, d, ...] -> [n, parts, d, ...]
        ordered = rows.reshape(parts, heads, head_dim, *rest).transpose(0, 1)
    else:
        # [n * d * parts, ...] -> [n, d, parts, ...] -> [n, parts, d, ...]
        ordered = rows.reshape(heads, head_dim, parts, *rest).transpose(1, 2)
    return ordered.reshape(rows.shape)
