"""`bonsai engines`: what it shows of what the gateway says, and that it says why it cannot."""

from __future__ import annotations

import asyncio
from io import StringIO
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from rich.console import Console

from bonsai.cli import main
from bonsai.client import open_client
from bonsai.engine_replies import Engine
from bonsai.engines_command import engines_table

ADAPTER: dict[str, Any] = {
    "policy": "pol-1111111111111111", "wanted": True, "resident": True, "served": True, "draining": False,
    "in_flight": 0, "proven_at": 990.0, "probed_at": 990.0, "used_at": None, "failures": 0, "reason": None,
}  # fmt: skip
REFUSED = {**ADAPTER, "policy": "pol-2222222222222222", "resident": False, "served": False, "proven_at": None}
LISTED = {
    "object": "list",
    "data": [
        {"id": "policy-0", "state": "ok", "reason": None, "slots": 4, "adapters": [ADAPTER]},
        {"id": "second", "state": "hung", "reason": "no token", "slots": 4, "adapters": []},
        {"id": "third", "state": "ok", "slots": 4, "adapters": [{**REFUSED, "reason": "no space left"}]},
    ],
}


async def found() -> list[Engine]:
    async def engines(_request: web.Request) -> web.Response:
        return web.json_response(LISTED)

    app = web.Application()
    app.add_routes([web.get("/engines", engines)])
    async with TestServer(app) as server, open_client(str(server.make_url("/")), api_key="k") as client:
        return await client.engines()


def test_each_engine_and_each_of_its_policies_has_a_row() -> None:
    console = Console(file=StringIO(), width=160)
    console.print(engines_table(asyncio.run(found()), now=1000.0))
    assert isinstance(console.file, StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [
        ["policy-0", "ok", "1/4", "pol-1111111111111111", "yes", "yes", "yes", "10 s ago", "", ""],
        ["second", "no token", "0/4", "-", "", "", "", "", "", ""],
        ["third", "ok", "0/4", "pol-2222222222222222", "yes", "", "", "", "", "no space left"],
    ]


def test_without_a_key_it_says_where_it_looked_for_one(tmp_path: Path) -> None:
    shown = CliRunner().invoke(main, ["engines", "--dir", str(tmp_path)], env={"BONSAI_API_KEY": ""})
    assert shown.exit_code == 1
    assert "admin.key" in shown.output.replace("\n", "")
