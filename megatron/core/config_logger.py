"""Writes configs as JSON into ``config_logger_dir``, for looking up later how a run was set up."""

import dataclasses
import json
import os
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

_path_counts: dict[str, int] = defaultdict(int)


def get_config_logger_path(config: Any) -> str:
    """Directory for the files, or an empty string."""
    return getattr(config, "config_logger_dir", "") or ""


def has_config_logger_enabled(config: Any) -> bool:
    """True when a directory is set."""
    return get_config_logger_path(config) != ""


def get_path_count(path: str) -> int:
    """How often ``path`` was asked for before in this process; counts this call."""
    count = _path_counts[path]
    _path_counts[path] += 1
    return count


def get_path_with_count(path: str) -> str:
    """``path`` with a suffix that makes each call's name a new one."""
    return f"{path}.iter{get_path_count(path)}"


class JSONEncoderWithMcoreTypes(json.JSONEncoder):
    """Also writes dtypes, functions, dataclasses, modules and enumerations, as text or mappings."""

    def default(self, o: Any) -> Any:
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return {field.name: getattr(o, field.name, None) for field in dataclasses.fields(o)}
        if isinstance(o, torch.Tensor):
            return f"tensor{tuple(o.shape)} {o.dtype}"
        if callable(o) and hasattr(o, "__qualname__"):
            return f"{o.__module__}.{o.__qualname__}"
        return str(o)


def log_config_to_disk(config: Any, dict_data: dict[str, Any], prefix: str = "") -> None:
    """Writes ``dict_data`` (usually a constructor's ``locals()``) as one JSON file of this rank.

    The file name holds the prefix (by default the class of ``dict_data["self"]``) and this process's rank.
    """
    directory = get_config_logger_path(config)
    if not directory:
        return
    os.makedirs(directory, exist_ok=True)
    owner = dict_data.get("self")
    prefix = prefix or (type(owner).__name__ if owner is not None else "config")
    rank = dist.get_rank() if dist.is_initialized() else 0
    data = {name: value for name, value in dict_data.items() if name not in ("self", "__class__")}
    path = get_path_with_count(os.path.join(directory, f"{prefix}.rank_{rank}"))
    with open(f"{path}.json", "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, cls=JSONEncoderWithMcoreTypes, skipkeys=True)
