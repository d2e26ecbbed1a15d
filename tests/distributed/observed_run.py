"""``pretrain_gpt.py`` on a rank of the pool, with a record of all reads of arguments and config fields."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from unittest import mock

from tests.distributed.real_loop import Record


@dataclass
class Observed(Record):
    """What a rank saw.

    Attributes:
        named: flags that are named as unread when set-up is over.
        read_in_setup, read_later: names of arguments and config fields, by when they were first read.
    """

    named: tuple[str, ...] = ()
    read_in_setup: frozenset[str] = frozenset()
    read_later: frozenset[str] = frozenset()


def observe(argv: list[str]) -> Observed:
    """Run ``pretrain_gpt.py argv`` on this rank and look on until its end."""
    import pretrain_gpt
    from megatron.training import global_vars, training, unread_flags

    record, output = Observed(), io.StringIO()

    def set_up_is_over() -> None:
        unread = global_vars.get_unread_flags()
        record.read_in_setup = frozenset(unread.reads.arguments | unread.reads.fields)
        record.named = tuple(unread_flags.on_all_ranks(unread.of_setup()))

    def run_is_over() -> None:
        unread = global_vars.get_unread_flags()
        record.read_later = frozenset(unread.reads.arguments | unread.reads.fields) - record.read_in_setup
        unread.reads.end()

    sys.argv = ["pretrain_gpt.py", *argv]
    os.environ["MEGATRON_DEVICE"] = "cpu"
    with (
        mock.patch.object(training, "name_flags_unread_in_setup", set_up_is_over),
        mock.patch.object(training, "name_flags_unread_by_script", run_is_over),
        contextlib.redirect_stdout(output),
    ):
        try:
            pretrain_gpt.main()
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                raise AssertionError(
                    f"{type(error).__name__}: {error}\n{output.getvalue()[-3000:]}"
                ) from error
    record.output = output.getvalue()
    return record
