"""Where a command finds its gateway and the key it shows there: the same for every command that asks one.

Owns: the two options and what they mean. Does not own: the API's client (client.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from bonsai.shared_options import Command, stack_directory

if TYPE_CHECKING:
    from bonsai.client import BonsaiClient

_URL = click.option(
    "--url", envvar="BONSAI_URL", default="http://127.0.0.1:8000", show_default=True, help="Of the gateway."
)
_DIRECTORY = stack_directory("Of the stack, whose administrator's key is used where BONSAI_API_KEY is not set.")


class GatewayAddress(NamedTuple):
    url: str
    directory: Path

    @property
    def api_key(self) -> str:
        """Raises OSError or ValueError where there is neither BONSAI_API_KEY nor a stack's key."""
        from service.api_key import read_admin_key

        return os.environ.get("BONSAI_API_KEY") or read_admin_key(self.directory / "admin.key")

    def open_client(self, timeout_seconds: float = 120.0) -> AbstractAsyncContextManager[BonsaiClient]:
        """Raises as `api_key`."""
        from bonsai.client import open_client

        return open_client(self.url, api_key=self.api_key, timeout_seconds=timeout_seconds)

    def run(self, work: Callable[[BonsaiClient], Awaitable[None]]) -> None:
        """Ends the command with status 1 and the reason, where the gateway refuses or is not there."""
        from bonsai.client import BonsaiError

        async def all_of_it() -> None:
            async with self.open_client() as client:
                await work(client)

        try:
            asyncio.run(all_of_it())
        except (BonsaiError, OSError, ValueError) as error:
            click.echo(f"failed {error}", err=True)
            sys.exit(1)


def asks_gateway(command: Command) -> Command:
    """`--url` and `--dir` for a command with the parameters `url` and `directory`."""
    return _URL(_DIRECTORY(command))
