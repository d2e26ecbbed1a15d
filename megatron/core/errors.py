"""Errors meant for the person who typed the command.

Every message names what was asked, what was found, and what to type instead. Entry points print the
message without a traceback and exit with a non-zero status; see ``megatron.training.entry``.
"""


class MegatronError(Exception):
    """Base of all errors whose message is complete without a traceback."""

    exit_status = 1


class ConfigError(MegatronError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(MegatronError):
    """A data set, corpus or tokenizer file that cannot be used as it is."""


class CheckpointError(MegatronError):
    """A checkpoint that cannot be read, does not fit this run, or cannot be written."""


class TrainingError(MegatronError, RuntimeError):
    """Training reached a state it must not go on from, such as a NaN loss."""


class NotBuiltYetError(MegatronError, NotImplementedError):
    """A feature whose flag or name exists but whose code does not.

    Args:
        feature: what was asked for, as a noun phrase ("tensor parallelism").
        flag: the command-line flag that asked for it, with its value.
        remedy: what to type instead.
    """

    def __init__(self, feature: str, flag: str | None = None, remedy: str | None = None):
        asked = f"{flag}: " if flag else ""
        hint = f" {remedy}" if remedy else ""
        super().__init__(f"{asked}{feature} is not built yet.{hint}")
