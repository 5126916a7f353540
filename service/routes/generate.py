"""`POST /generate`: the best of n completions of a prompt.

Owns: reading the request and writing the reply, and stopping the engine when the client goes away. Does not own: what
happens in between (serving.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from time import monotonic
from typing import Any, TypeVar, cast

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from bon_algos.contracts import CandidateGroup
from service.access import caller_of, needs
from service.best_of_n import candidate_counts, finished_count, selection_of, warnings_of
from service.errors import ClientGone, InvalidField
from service.generation import GenerateRequest
from service.headers import ARM, IDEMPOTENCY_KEY, POLICY, TIMEOUT, UNIT
from service.idempotency import Idempotency
from service.json_body import LONG_BYTES, parse_aside, query_parameters, read_body
from service.plain_route import PlainRoute
from service.replays import Reply
from service.request_cost import drawn_tokens
from service.serving import Circumstances, Prepared, Serving, answer, ledger_warnings, prepare

MAX_UNIT_LENGTH = 256
DECIDING = (ARM, UNIT, TIMEOUT)
"""Headers that decide about the answer as the body does."""
router = APIRouter(route_class=PlainRoute)
T = TypeVar("T")


@router.post("/generate", dependencies=[needs("complete")])
async def generate(request: Request) -> Response:
    """Sample, score, choose, log, reply."""
    started = monotonic()
    serving = serving_of(request)
    content = await read_body(request, serving.max_body_bytes)
    body = await parse_aside(content, GenerateRequest)
    around = circumstances_of(request, started, query_parameters(request, ("n",)))
    prepared = await prepared_aside(request, partial(prepare, serving, body, around))

    async def make() -> Reply:
        filled = await while_connected(request.receive, answer(serving, prepared, wait_for_reward=body.wait_for_reward))
        reply = reply_object(filled.group, prepared, return_candidates=body.return_candidates)
        reply["warnings"] += ledger_warnings(serving)
        return Reply(reply, headers_of(filled.group, monotonic() - started - filled.waited))

    return await replied(serving, prepared, once_of(request, prepared, content), make)


def serving_of(request: Request) -> Serving:
    """What a completion needs. Its reply, whatever it will be, tells of the caller's limits."""
    serving = cast(Serving, request.app.state.serving)
    request.state.reply_headers = partial(serving.limits.headers, caller_of(request))
    return serving


def once_of(request: Request, prepared: Prepared, content: bytes) -> Idempotency | None:
    """The request's `Idempotency-Key`, if it has one. Raises Unparseable, InvalidField where no reply may be kept."""
    asked = _idempotency(request, content) if IDEMPOTENCY_KEY in request.headers else None
    if asked is not None and not prepared.group.store:
        raise InvalidField(
            f"{IDEMPOTENCY_KEY} keeps the reply for a day, which store: false forbids", param=IDEMPOTENCY_KEY
        )
    return asked


async def replied(
    serving: Serving, prepared: Prepared, asked: Idempotency | None, make: Callable[[], Awaitable[Reply]]
) -> Response:
    """The reply, drawn once for an `Idempotency-Key`."""
    reply = await serving.replays.once(asked, prepared.budget.seconds, make)
    return Response(to_json(reply.body), headers=reply.headers, media_type="application/json")


def _idempotency(request: Request, content: bytes) -> Idempotency | None:
    path = f"{request.method} {request.scope['path']}?{request.url.query}"
    said = [f"{name}: {request.headers[name]}" for name in DECIDING if name in request.headers]
    operation = "\n".join((path, *said))
    return Idempotency.of(request.headers.get(IDEMPOTENCY_KEY), operation, content.decode(), caller_of(request).tenant)


async def prepared_aside(request: Request, make: Callable[[], Prepared]) -> Prepared:
    """What `make` gives, from a thread where tokenising the body would hold up other requests."""
    is_long = int(request.headers.get("content-length", LONG_BYTES)) >= LONG_BYTES
    return await asyncio.to_thread(make) if is_long else make()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled as soon as the client goes away, and then ClientGone is raised."""
    # A timeout that passes when the client goes: `work` needs no task of its own.
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as presence:

            def leave(done: asyncio.Task[None]) -> None:
                if not done.cancelled() and not is_over:
                    presence.reschedule(loop.time())

            is_over = False
            watcher = loop.create_task(_disconnected(receive))
            watcher.add_done_callback(leave)
            try:
                return await work
            finally:
                is_over = True
                watcher.cancel()
    except TimeoutError:
        if presence.expired():
            raise ClientGone("the client went away") from None
        raise


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def reply_object(group: CandidateGroup, prepared: Prepared, *, return_candidates: bool) -> dict[str, Any]:
    """The reply's JSON. The group has a selected candidate."""
    chosen = group.candidates[cast(int, group.selected)]
    tokens = [len(candidate.token_ids) for candidate in group.candidates]
    completion_tokens = len(chosen.token_ids)
    reply: dict[str, Any] = {
        "id": group.id,
        "object": "bonsai.generation",
        "created": int(group.created_at),
        "route": group.route,
        "completion": chosen.text,
        "finish_reason": chosen.finish_reason,
        "reward": chosen.reward,
        "arm": str(group.arm),
        "arm_reason": group.arm_reason,
        "experiment": group.experiment,
        "policy": group.answered_by,
        "candidates": candidate_counts(group),
        "selection": selection_of(group),
        "usage": {
            "prompt_tokens": len(group.prompt_token_ids),
            "completion_tokens": completion_tokens,
            "discarded_tokens": sum(tokens) - completion_tokens,
            "total_tokens": len(group.prompt_token_ids) + sum(tokens),
        },
        "warnings": [*prepared.warnings, *warnings_of(group)],
    }
    if return_candidates:
        reply["choices"] = [_choice(group, i) for i in range(len(group.candidates))]
    return reply


def _choice(group: CandidateGroup, index: int) -> dict[str, Any]:
    candidate = group.candidates[index]
    return {
        "index": index,
        "policy": candidate.policy_id or group.policy_id,
        "text": candidate.text,
        "reward": candidate.reward,
        "disagreement": candidate.disagreement,
        "finish_reason": candidate.finish_reason,
        "failure": candidate.failure,
        "tokens": len(candidate.token_ids),
        "logprob": sum(candidate.logprobs) if candidate.token_ids else None,
        "selected": index == group.selected,
    }


def circumstances_of(request: Request, started: float, query: Mapping[str, str]) -> Circumstances:
    unit = request.headers.get(UNIT)
    if unit is not None and not (1 <= len(unit) <= MAX_UNIT_LENGTH and unit.isascii() and unit.isprintable()):
        raise InvalidField(f"{UNIT} must be 1 to {MAX_UNIT_LENGTH} printable ASCII characters", param=UNIT)
    caller, forced_arm = caller_of(request), request.headers.get(ARM)
    if forced_arm is not None:
        caller.require("force_arm", param=ARM)
    return Circumstances(
        query=query,
        request_id=request.state.request_id,
        caller=caller,
        unit=unit,
        forced_arm=forced_arm,
        timeout=request.headers.get(TIMEOUT),
        started=started,
    )


def headers_of(group: CandidateGroup, overhead_seconds: float) -> dict[str, str]:
    return {
        ARM: str(group.arm),
        POLICY: group.answered_by,
        "x-bonsai-candidates": f"{finished_count(group)}/{group.requested}",
        "x-bonsai-selection": group.status,
        "x-bonsai-cost": str(drawn_tokens(group)),
        "x-bonsai-overhead-duration-ms": f"{1000 * overhead_seconds:.2f}",
    }
