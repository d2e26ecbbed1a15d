"""Token sequences on disk: ``P.bin`` holds the ids, ``P.idx`` says where each sequence and document is.

Names are loaded on first use: writing a data set (:class:`IndexedDatasetBuilder`) does not import torch.
"""

import importlib
from typing import Any

_HOMES = {
    "layout": ("DType", "_IndexReader", "_IndexWriter", "get_bin_path", "get_idx_path"),
    "bin_readers": ("_BinReader", "_FileBinReader", "_MMapBinReader", "_S3BinReader"),
    "dataset": ("IndexedDataset",),
    "builder": ("IndexedDatasetBuilder",),
    "megatron.core.datasets.utils_s3": ("S3Config",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME_OF[name]
    value = getattr(importlib.import_module(home if "." in home else f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
