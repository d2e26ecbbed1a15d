"""Stands in for MindSpeed where that is not installed, so that scripts with its first line run unchanged.

``import mindspeed.megatron_adaptor`` then does what ``import megatron_npu.megatron_adaptor`` does. Where
MindSpeed itself is installed, wherever it stands on the search path, this package hands over to it: what the
script gets as ``mindspeed`` is the real one and nothing of this directory.
"""

import importlib.machinery
import importlib.util
import os
import sys

import megatron  # says which Python is needed

# Other copies of this package (a checkout beside an installation) are known by this line.
_STANDS_IN_FOR_MINDSPEED = True


def _find_mindspeed() -> importlib.machinery.ModuleSpec | None:
    """The real package, asked from every finder and every entry of the search path."""
    find_in = importlib.machinery.PathFinder.find_spec
    candidates = [find_in(__name__, [entry]) for entry in sys.path]
    # Editable installations have finders of their own.
    others = (finder for finder in sys.meta_path if finder is not importlib.machinery.PathFinder)
    candidates += [finder.find_spec(__name__, None) for finder in others if hasattr(finder, "find_spec")]
    return next((spec for spec in candidates if spec is not None and _is_mindspeed(spec)), None)


def _is_mindspeed(spec: importlib.machinery.ModuleSpec) -> bool:
    if spec.origin is None or not os.path.isfile(spec.origin):
        # A directory without __init__.py may be anything of that name.
        locations = spec.submodule_search_locations or ()
        return any(os.path.isfile(os.path.join(each, "megatron_adaptor.py")) for each in locations)
    with open(spec.origin, encoding="utf-8", errors="replace") as file:
        return "_STANDS_IN_FOR_MINDSPEED" not in file.read()


class _OtherModules:
    """The last finder: says whose a module of MindSpeed is that this package does not have."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname.startswith(f"{__name__}."):
            raise ModuleNotFoundError(
                f"{fullname} is a part of MindSpeed, which is not installed. Megatron-NPU answers "
                f"{__name__}.megatron_adaptor alone, and needs no other part: leave this import out, or "
                "install MindSpeed",
                name=fullname,
            )


def _hand_over_or_stay() -> None:
    spec = _find_mindspeed()
    if spec is None:
        sys.meta_path.append(_OtherModules)
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)


_hand_over_or_stay()
