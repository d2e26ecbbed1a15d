"""Values for a config's fields from arguments of the same names."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from megatron.training.arguments.accepted import INERT_DESTS


def field_values(
    config_class: type, args: Namespace, special: Mapping[str, Callable[[Namespace], Any]]
) -> dict[str, Any]:
    """Constructor arguments of a config dataclass.

    Flags that are accepted without effect never reach a config, and a field without an argument keeps its
    default.

    Args:
        config_class: the dataclass.
        args: validated arguments.
        special: what makes the fields that are not the argument of the same name.
    """
    values, arguments = {}, vars(args)  # copying a value into a config is no use of the argument
    for entry in fields(config_class):
        if entry.name in special:
            values[entry.name] = special[entry.name](args)
        elif entry.name in arguments and entry.name not in INERT_DESTS:
            values[entry.name] = arguments[entry.name]
    return values
