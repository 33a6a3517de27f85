# SPDX-License-Identifier: Apache-2.0
"""Short messages for people in place of the parser's long dumps."""

from __future__ import annotations

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class UsageError(ValueError):
    """Wrong usage or configuration; the command line prints its text alone and exits with 2."""


class ShortErrorParser(LightningArgumentParser):
    """Parser that raises UsageError with a few lines instead of printing its usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the short form of a parser message."""
        raise UsageError(message) from ex
