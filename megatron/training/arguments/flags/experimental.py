"""Own layer specs and configuration files."""

from megatron.training.arguments.flag import Group, value

GROUP = Group(
    "experimental",
    (
        value(
            "--transformer-impl",
            default="transformer_engine",
            choices=("local", "transformer_engine"),
            help="local modules or TransformerEngine modules",
        ),
        value("--spec", nargs="*", help="module path and name of a layer/block spec, or the word local"),
        value("--yaml-cfg", help="take all settings from a YAML file"),
    ),
)
