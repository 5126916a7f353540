"""`python -m service`: one gateway process, told everything by its environment (settings.py)."""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial

from pydantic import ValidationError
from pydantic_settings import SettingsError

from service.settings import GatewaySettings


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
    # Whoever told it something wrong is not kept waiting for what takes a second to load.
    from service.app import create_app, open_gateway
    from service.server import Server, server_config

    app = create_app(partial(open_gateway, settings))
    server = Server(server_config(app, settings), app.state.draining)
    server.run()
    return int(server.has_failed)


if __name__ == "__main__":
    sys.exit(main())
