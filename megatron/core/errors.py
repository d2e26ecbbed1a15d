"""Errors meant for the person who typed the command.

Every message names what was asked, what was found, and what to type instead. Entry points print the
message without a traceback and exit with a non-zero status; see ``megatron.training.entry``.

Scripts and tests written for Megatron-LM catch Python's own classes, and which of them a place raises there
follows no rule that could be remembered: one place asserts what its neighbour raises a ValueError for. So a
class here is every class that any of its places is expected to raise.
"""


class MegatronError(Exception):
    """Base of all errors whose message is complete without a traceback."""

    exit_status = 1


class ConfigError(MegatronError, ValueError, AssertionError):
    """A setting, an argument, or a combination of them, that cannot work."""


class UsageError(ConfigError, RuntimeError):
    """A call that cannot be answered: too early, once too often, or for ranks or objects that do not fit."""


class DataError(MegatronError, AssertionError):
    """A data set, corpus or tokenizer file that cannot be used as it is."""


class CheckpointError(MegatronError, AssertionError):
    """A checkpoint that cannot be read, does not fit this run, or cannot be written."""


class TrainingError(MegatronError, RuntimeError):
    """Training reached a state it must not go on from, such as a NaN loss."""


class NotOfferedError(MegatronError, NotImplementedError):
    """Something that an object of this kind does not have, though others of its base class do."""


class NotBuiltYetError(MegatronError, NotImplementedError, AssertionError):
    """A feature whose name exists but whose code does not.

    Args:
        feature: what was asked for, as a noun phrase ("tensor parallelism").
        setting: the config field, argument or flag that asked for it, with its value.
        remedy: what to do instead.
    """

    def __init__(self, feature: str, setting: str | None = None, remedy: str | None = None):
        asked = f"{setting}: " if setting else ""
        hint = f" {remedy}" if remedy else ""
        super().__init__(f"{asked}{feature} is not built yet.{hint}")
