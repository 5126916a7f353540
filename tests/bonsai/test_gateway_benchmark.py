"""The gateway's benchmark: what its numbers mean, and who answers peers."""

import asyncio
import json
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from benchmarks.gateway import peers, profiling, real, report
from benchmarks.gateway.load import Latencies, Saturation
from benchmarks.gateway.stays import SAMPLES, Ledger, Stays, slope, spooled
from benchmarks.gateway.stub import OPTILLM_ASKS, TOKENS, N, Stub
from service.spool import Spool

RNG = np.random.default_rng(0)
REQUESTS = [250 * number for number in range(1, SAMPLES + 1)]
FLAT = [(sent, 100.0) for sent in REQUESTS]


def grown(megabytes: float, noise: np.ndarray | None = None) -> list[tuple[int, float]]:
    """Memory that grows by so much over 10,000 requests."""
    more = np.zeros(SAMPLES) if noise is None else noise
    return [(sent, 100 + megabytes * sent / 10_000 + extra) for sent, extra in zip(REQUESTS, more, strict=True)]


def lasting_noise() -> np.ndarray:
    """Half of what was there at the last sample is still there."""
    noise = np.zeros(SAMPLES)
    for i in range(1, SAMPLES):
        noise[i] = 0.5 * noise[i - 1] + RNG.normal()
    return noise


def test_the_slope_of_a_line_is_the_lines():
    found = slope(grown(0.5))

    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_what_the_first_half_took_is_no_slope():
    filled = [(sent, 50 + sent / 500) for sent in REQUESTS[: SAMPLES // 2]]

    assert slope([*filled, *FLAT[SAMPLES // 2 :]]).high == pytest.approx(0, abs=1e-9)


def test_the_interval_of_a_slope_holds_the_truth_about_as_often_as_it_says():
    held = [(found := slope(grown(2, lasting_noise()))).low <= 2 <= found.high for _ in range(200)]

    assert sum(held) >= 170  # of 190; blocks of ten see a little less than all of what lasts


def test_a_slope_needs_more_than_a_few_samples():
    with pytest.raises(ValueError, match="40 samples"):
        slope(FLAT[:10])


def measured(name: str, *, added: float = 0, per_core: float = 400, failed: int = 0) -> report.Measured:
    alone, through = Latencies([30.0] * 9, [0.0], 0), Latencies([30.0 + added] * 9, [0.0], failed)
    return report.Measured(name, 300, alone, through, Saturation(1000, 0, 5, 1000 / per_core))


def broken(*peers: report.Measured, best_of: report.Measured, memory: list[tuple[int, float]] = FLAT) -> list[str]:
    found = report.Found([best_of], list(peers), {}, Stays(Ledger(1, 1, 1, 1), memory, 0))
    return [claim.name for claim in report.claims_of(found) if not claim.holds]


def test_a_gateway_that_adds_little_and_keeps_nothing_keeps_every_promise():
    assert broken(measured("LiteLLM, 1 call passed on", per_core=50), best_of=measured("/generate", added=2)) == []


def test_texts_alone_passed_on_are_told_and_no_promise():
    assert broken(measured("texts alone through LiteLLM", per_core=100), best_of=measured("/generate", added=2)) == []


def test_each_promise_can_be_broken():
    slow = measured("/generate", added=7, per_core=300, failed=1)

    assert broken(measured("LiteLLM, 1 call passed on", per_core=38), best_of=slow, memory=grown(1.1)) == [
        "added by /generate at 300/s, p50, ms",
        "the same, p99, ms",
        "requests that were not answered",
        "memory, MB more for 10,000 requests, upper 95 % bound",
        "requests per core·s ÷ those of LiteLLM",
    ]


LOOP = "main (service/__main__.py:1);run (uvicorn/server.py:1);Runner.run (asyncio/runners.py:1)"
LINES = (
    f"{LOOP};Door.__call__ (service/draining.py:1);generate (service/routes/generate.py:1);"
    "sample (service/vllm.py:1);feed (bon_algos/vllm_protocol.py:1) 6",
    f"{LOOP};Door.__call__ (service/draining.py:1);generate (service/routes/generate.py:1) 3",
    f"{LOOP} 1",
    "_bootstrap (threading.py:1);_worker (concurrent/futures/thread.py:1) 90",
)
PROFILE = profiling.Profile(2.0, profiling.stacks_of(LINES))


def test_the_innermost_file_with_a_part_has_the_sample():
    shares = {part: share for part, share in profiling.parts_of(PROFILE).items() if share}

    # Of ten: the thread that waits has none, and what is around the event loop is not the server's work.
    assert shares == {"engine client: drawing": 0.6, "reply": 0.3, profiling.REST: 0.1}


def test_the_last_function_of_ours_is_told():
    assert profiling.functions_of(PROFILE)[0] == ("feed (bon_algos/vllm_protocol.py:1)", "60.0")


def test_files_that_belong_to_a_part_are_there(request: pytest.FixtureRequest):
    named = [path for paths in profiling.PARTS.values() for path in paths if path.startswith(profiling.OURS)]

    assert [path for path in named if not (request.config.rootpath / path).exists()] == []


def test_a_group_takes_its_frame_on_the_disk(tmp_path):
    with closing(Spool(tmp_path, 2**20)) as spool:
        for length in (100, 300):
            spool.append(b"x" * length)

        assert spooled(tmp_path) == 200 + 12  # a frame's header: magic, length, checksum


def test_texts_of_a_stream_are_put_together_by_candidate():
    pieces = [(1, "b"), (0, "a"), (1, "d"), (0, "c")]
    events = [b"data: " + json.dumps({"choices": [{"index": i, "text": text}]}).encode() for i, text in pieces]

    assert real.texts_of(b"\n\n".join([*events, b"data: [DONE]", b""]))[:3] == ["ac", "bd", ""]


def stub_replies(*bodies: dict[str, object]) -> tuple[list[list[dict[str, Any]]], int]:
    """The choices that the stub answers chat completions with, and how many calls it counted."""

    async def answered() -> tuple[list[list[dict[str, Any]]], int]:
        async with TestClient(TestServer(Stub().app())) as client:
            replies = [await (await client.post("/v1/chat/completions", json=body)).json() for body in bodies]
            counted = await (await client.get("/calls")).text()
        return [reply["choices"] for reply in replies], int(counted)

    return asyncio.run(answered())


def stub_answers(*bodies: dict[str, object]) -> tuple[list[list[str]], int]:
    """The texts of those."""
    replies, calls = stub_replies(*bodies)
    return [[choice["message"]["content"] for choice in choices] for choices in replies], calls


def chat(content: str, **members: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], **members}


def test_peers_that_draw_get_as_many_texts_as_they_ask_for_and_every_call_is_counted():
    (many, one), calls = stub_answers(chat("hi", n=N), chat("hi"))

    assert (len(many), len(one), calls) == (N, 1, 2)


def test_a_peer_that_asks_for_tokens_gets_them_with_their_log_probs():
    [(*_, last), (bare, *_)], _ = stub_replies(chat("hi", n=N, **peers.TOKENS_TOLD), chat("hi", n=N))

    assert (len(last["token_ids"]), len(last["logprobs"]["content"])) == (TOKENS, TOKENS)
    assert (bare["logprobs"], "token_ids" in bare) == (None, False)


def test_peers_that_ask_what_candidates_are_worth_get_what_they_can_read():
    wanted = {"type": "json_schema"}
    ([rating], [judged]), _ = stub_answers(chat(OPTILLM_ASKS, n=1), chat("which?", response_format=wanted))

    assert 0 <= float(rating) <= 10
    assert json.loads(judged)["answer_choice"] in range(N)
