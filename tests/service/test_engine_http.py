"""What an engine says is JSON that can be written again, or the engine is broken."""

import asyncio

import pytest
from aiohttp import web

from service.engine_http import EngineHttp
from service.errors import EngineBroken, EngineUnavailable, PolicyNotServed
from tests.stubs.server import running


def app(body: bytes) -> web.Application:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/", answer)
    return app


async def said(url: str) -> dict[str, object]:
    http = EngineHttp(
        url, title="engine", unavailable=EngineUnavailable, not_served=PolicyNotServed, broken_code="engine_broken"
    )
    try:
        return await http.get("/", 10)
    finally:
        await http.close()


@pytest.mark.parametrize(
    "body",
    [
        b'{"text": "\\ud800"}',  # half a surrogate pair
        b'{"text": "\\udc00 and on"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text": "cut',
        b"[]",
        b"",
    ],
)
def test_what_is_no_json_object_is_a_broken_engine(body):
    with running(app(body)) as url, pytest.raises(EngineBroken):
        asyncio.run(said(url))


def test_numbers_and_texts_come_as_they_were_said():
    body = b'{"text": "caf\\u00e9 \\ud83c\\udfac \\u0000", "logprob": -0.30000000000000004, "tiny": 5e-324, "id": 123}'
    with running(app(body)) as url:
        found = asyncio.run(said(url))
    assert found == {"text": "café 🎬 \x00", "logprob": -0.30000000000000004, "tiny": 5e-324, "id": 123}
