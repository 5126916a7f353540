"""What the client sends, what it reads and how it fails, against a server that speaks the public API."""

import asyncio
import socket
import tracemalloc

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bonsai.client import GatewayUnreachable, RequestRefused, UnreadableReply, open_client
from bonsai.job_replies import Job
from tests.bonsai.scripted_gateway import ScriptedGateway

MiB = 2**20


def test_an_arm_is_forced_and_a_unit_named_by_header():
    gateway = ScriptedGateway()

    async def ask() -> None:
        async with gateway.client() as client:
            await client.generate("Once", n=4, arm="base:4", unit="reader-1", wait_for_reward=True)

    asyncio.run(ask())
    (request,) = gateway.requests
    assert request["query"] == {"n": "4"}
    assert request["headers"]["x-bonsai-arm"] == "base:4"
    assert request["headers"]["x-bonsai-unit"] == "reader-1"
    assert (request["prompt"], request["wait_for_reward"]) == ("Once", True)


def test_what_is_not_given_is_not_sent():
    gateway = ScriptedGateway()

    async def ask() -> None:
        async with gateway.client() as client:
            await client.generate("Once")

    asyncio.run(ask())
    (request,) = gateway.requests
    assert request["query"] == {}
    assert not {"x-bonsai-arm", "x-bonsai-unit"} & set(request["headers"])


@pytest.mark.parametrize(
    ("given", "in_environment", "sent"),
    [("a", "b", "Bearer a"), (None, "b", "Bearer b"), (None, None, None), ("", "b", None)],
)
def test_the_key_is_the_one_given_else_the_environments(monkeypatch, given, in_environment, sent):
    monkeypatch.delenv("BONSAI_API_KEY", raising=False)
    if in_environment is not None:
        monkeypatch.setenv("BONSAI_API_KEY", in_environment)

    async def reply(request: web.Request) -> web.Response:
        return web.json_response({"id": request.headers.get("Authorization", "none"), "status": "running"})

    async def ask() -> str:
        app = web.Application()
        app.add_routes([web.get("/distill/{job}", reply)])
        async with TestServer(app) as server, open_client(str(server.make_url("/")), api_key=given) as client:
            return (await client.job("job_1")).id

    assert asyncio.run(ask()) == (sent or "none")


def test_generated_tokens_count_the_candidates_that_were_not_served():
    async def ask() -> int:
        async with ScriptedGateway([1.0, 3.0, 2.0]).client() as client:
            answer = await client.generate("Once", n=3)
            assert answer.completion == "completion 1"
            assert [choice.selected for choice in answer.choices] == [False, True, False]
            return answer.usage.generated_tokens

    assert asyncio.run(ask()) == 15  # three candidates of five tokens


def test_a_refusal_carries_status_code_and_message():
    async def ask() -> None:
        async with ScriptedGateway().client() as client:
            await client.job("job_none")

    with pytest.raises(RequestRefused, match=r"no such job \(404 job_not_found\)"):
        asyncio.run(ask())


def test_a_closed_port_is_unreachable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def ask() -> None:
        async with open_client(f"http://127.0.0.1:{port}") as client:
            await client.job("job_1")

    with pytest.raises(GatewayUnreachable, match="GET /distill/job_1"):
        asyncio.run(ask())


def ask_a_busy_gateway(refusals: int, *, patience_seconds: float) -> tuple[Job, int]:
    """A job asked of a gateway that first refuses, naming a pause of 0 s; and how often it was asked."""
    asked = 0

    async def reply(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked <= refusals:
            error = {"message": "the reward model cannot be reached", "code": "reward_model_unavailable"}
            return web.json_response({"error": error}, status=503, headers={"Retry-After": "0"})
        return web.json_response({"id": "job_1", "status": "running"})

    async def ask() -> Job:
        app = web.Application()
        app.add_routes([web.get("/distill/{job}", reply)])
        async with TestServer(app) as server:
            url = str(server.make_url("/"))
            async with open_client(url, patience_seconds=patience_seconds) as client:
                return await client.job("job_1")

    return asyncio.run(ask()), asked


def test_not_now_is_asked_again_after_the_pause_the_gateway_names():
    job, asked = ask_a_busy_gateway(2, patience_seconds=30)
    assert (job.status, asked) == ("running", 3)


def test_patience_ends():
    with pytest.raises(RequestRefused, match=r"cannot be reached \(503 reward_model_unavailable\)"):
        ask_a_busy_gateway(10**9, patience_seconds=0.2)


@pytest.mark.parametrize("body", ["<html>not ours</html>", '{"id": "job_1"}'])
def test_a_foreign_server_is_named_as_such(body):
    async def reply(request: web.Request) -> web.Response:
        return web.Response(text=body)

    async def ask() -> None:
        app = web.Application()
        app.add_routes([web.get("/distill/{job}", reply)])
        async with TestServer(app) as server, open_client(str(server.make_url("/"))) as client:
            await client.job("job_1")

    with pytest.raises(UnreadableReply, match="GET /distill/job_1"):
        asyncio.run(ask())


def exported_from(pieces: int, *, announced: int, seconds: float = 120.0) -> int:
    """The bytes that came of a policy whose gateway announces `announced` MiB and sends `pieces` of them."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(announced * MiB)})
        await response.prepare(request)
        for _ in range(pieces):
            await response.write(bytes(MiB))
        response.force_close()
        return response

    async def ask() -> int:
        app = web.Application()
        app.add_routes([web.get("/policies/{policy}/export", reply)])
        async with TestServer(app) as server:
            url = str(server.make_url("/"))
            async with open_client(url, timeout_seconds=seconds) as client:
                return sum([len(piece) async for piece in client.export_policy("prod", "owner/model")])

    return asyncio.run(ask())


def test_weights_that_are_exported_are_never_in_memory_and_may_take_longer_than_another_call():
    tracemalloc.start()
    try:
        assert exported_from(64, announced=64, seconds=1e-3) == 64 * MiB
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MiB


def test_an_export_that_breaks_off_is_no_export():
    with pytest.raises(GatewayUnreachable, match="GET /policies/prod/export"):
        exported_from(1, announced=2)


def test_a_job_is_final_only_in_a_final_state():
    assert [Job(id="job_1", status=s).is_final for s in ("queued", "running", "paused")] == [False] * 3
    assert [Job(id="job_1", status=s).is_final for s in ("succeeded", "failed", "cancelled")] == [True, True, True]
