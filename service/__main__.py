"""`python -m service`: one gateway process, told everything by its environment (settings.py)."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import SettingsError

from service.app import create_app, open_gateway
from service.edge import MAX_HEADER_BYTES
from service.server import ImpatientProtocol, Server
from service.settings import GatewaySettings


def server_config(app: FastAPI, settings: GatewaySettings) -> uvicorn.Config:
    """How the gateway is served."""
    protocol = partial(
        ImpatientProtocol,
        header_seconds=settings.header_seconds,
        max_header_bytes=MAX_HEADER_BYTES,
        unread_seconds=settings.unread_seconds,
    )
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # uvicorn only ever calls it.
        http=cast("type[asyncio.Protocol]", protocol),
        loop="uvloop",
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(0)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = GatewaySettings()
    except ValidationError as error:
        for fault in error.errors(include_input=False, include_url=False):
            print(f"BONSAI_{str(fault['loc'][0]).upper()}: {fault['msg']}", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"{error}: it must be JSON", file=sys.stderr)
        return 2
    for stopping in (signal.SIGTERM, signal.SIGINT):
        # The server raises the signal again when everything has been shut down in order: that is a clean end.
        signal.signal(stopping, _leave)
    app = create_app(partial(open_gateway, settings))
    server = Server(server_config(app, settings), app.state.draining)
    server.run()
    return int(server.has_failed)


if __name__ == "__main__":
    sys.exit(main())
