"""The handler that carries log records to stdout."""

import logging
from typing import TextIO

# Loggers whose records tell a user nothing about the run.
HIDDEN_LOGGERS = ("torch.distributed",)


class CustomHandler(logging.StreamHandler):
    """Stream handler that drops the records of chatty libraries."""

    def __init__(self, stream: TextIO | None = None):
        super().__init__(stream)

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.name.startswith(HIDDEN_LOGGERS) and bool(super().filter(record))
