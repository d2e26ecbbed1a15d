"""Enumerations whose names and values user scripts and checkpoints rely on."""

import enum


class ModelType(enum.Enum):
    """Kind of model, for the layout over pipeline stages."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
    retro_encoder = 3
    retro_decoder = 4


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class Fp8Recipe(str, enum.Enum):
    """Names of fp8 scaling recipes."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    mxfp8 = "mxfp8"
