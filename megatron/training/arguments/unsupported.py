"""Names that scripts import but whose models are not part of this project."""

from argparse import Namespace

from megatron.core.errors import ConfigError


def _refuse(models: str, flag: str) -> ConfigError:
    return ConfigError(f"{flag}: {models} are not part of this project; leave the flag out")


def validate_model_config_args_from_heterogeneous_config(args: Namespace) -> None:
    """Refuses a file of per-layer shapes; does nothing when none is given."""
    path = getattr(args, "heterogeneous_layers_config_path", None)
    if path or getattr(args, "heterogeneous_layers_config_encoded_json", None):
        raise _refuse("per-layer architectures from a file", "--heterogeneous-layers-config-path")


def load_retro_config(retro_project_dir: str) -> None:
    """Always refuses."""
    raise _refuse("retrieval-enhanced (Retro) models", f"--retro-project-dir {retro_project_dir}")


def load_retro_args(args: Namespace) -> None:
    """Refuses a Retro project; does nothing when none is given."""
    if getattr(args, "retro_project_dir", None):
        load_retro_config(args.retro_project_dir)
