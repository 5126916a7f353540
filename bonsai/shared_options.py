"""Options that several commands have: whose stack, which Redis.

Owns: their names, defaults and values. Does not own: what a command finds there, nor what one command has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

Command = Callable[..., Any]
Option = Callable[[Command], Command]

REDIS_URL: Final = click.option(
    "--redis-url", envvar="BONSAI_REDIS_URL", metavar="URL", help="Its Redis, where it is one of yours."
)
ARCHIVE: Final = click.option(
    "--archive",
    envvar="BONSAI_ARCHIVE",
    default="",
    metavar="URL",
    help="A directory or s3://bucket/prefix; default: the stack's own.",
)


def stack_directory(says: str) -> Option:
    """`--dir`, the parameter `directory`. says: what it is to this command."""
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path(".bonsai"),
        show_default=True,
        help=says,
    )


def in_order(options: Sequence[Option]) -> Option:
    """All of them, as `--help` is to list them."""

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated
