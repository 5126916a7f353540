"""A Python function as a reward model: `python -m bonsai.function_reward MODULE:FUNCTION --uds SOCKET`.

Owns HTTP: the schema of `bon_algos.reward_protocol`, with a status for each way in which a call fails. Does not own
the processes in which the function runs (`function_processes`): a call that hangs keeps none of this from answering.

    404 another reward model was asked for · 422 no such request · 500 its process died · 503 too many calls wait ·
    504 it took too long
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click
from aiohttp import web
from pydantic import BaseModel, ValidationError

from bonsai.function_call import FunctionError
from bonsai.function_processes import CallFailed, CallTooLong, FunctionProcesses, NoRoom

PROCESSES: Final = 2
SECONDS: Final = 10.0
LARGEST_BODY: Final = 64 * 2**20


class ScoreRequest(BaseModel):
    model: str
    prompt: str
    messages: list[dict[str, Any]] | None = None
    completions: list[str]


def application(function: FunctionProcesses) -> web.Application:
    """The function, which has been started, over HTTP."""

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": function.model, "object": "model"}]})

    async def score(request: web.Request) -> web.Response:
        try:
            asked = ScoreRequest.model_validate_json(await request.read())
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            return _refused(422, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
        if asked.model != function.model:
            return _refused(404, "another reward model is served here")
        try:
            return web.json_response(await function.call(asked.model_dump(exclude={"model"})))
        except NoRoom:
            return _refused(503, "too many calls wait")
        except CallTooLong as failure:
            return _refused(504, str(failure))
        except CallFailed as failure:
            return _refused(500, str(failure))

    app = web.Application(client_max_size=LARGEST_BODY)
    app.add_routes([web.get("/v1/models", models), web.post("/score", score)])
    return app


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


async def serve(name: str, socket: Path, *, processes: int, seconds: float) -> None:
    """Until SIGTERM or SIGINT. Raises FunctionError when the function cannot be imported, or not as it was."""
    function = FunctionProcesses(name, processes=processes, seconds=seconds)
    await function.start()
    # A closed connection cancels its handler: a call that nobody waits for is not begun.
    runner = web.AppRunner(application(function), access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    keeping = asyncio.create_task(function.keep())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, keeping.cancel)
    try:
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        os.chmod(socket, 0o600)
        print(f"{name} is {function.model} at unix://{socket}", flush=True)
        with suppress(asyncio.CancelledError):
            await keeping
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        await runner.cleanup()


@click.command()
@click.argument("name", metavar="MODULE:FUNCTION")
@click.option(
    "--uds", "socket", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where it listens."
)
@click.option("--processes", type=click.IntRange(1, 64), default=PROCESSES, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.01, 3600), default=SECONDS, show_default=True, help="That one call may take."
)
def main(name: str, socket: Path, processes: int, seconds: float) -> None:
    """Serve a function of the current directory, or of PYTHONPATH, as a reward model."""
    try:
        asyncio.run(serve(name, socket, processes=processes, seconds=seconds))
    except* FunctionError as errors:
        sys.exit("\n".join(f"FunctionError: {error}" for error in errors.exceptions))


if __name__ == "__main__":
    main()
