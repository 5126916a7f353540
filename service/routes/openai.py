"""`/v1`: OpenAI's completions, chat completions and models, answered by best-of-n.

Owns: which endpoint has which body and which reply, and the list of models. Does not own: their form (openai_bodies.py,
openai_replies.py), streams (openai_stream.py), what happens in between (serving.py).
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.access import caller_of, needs
from service.errors import InvalidField, NotFound
from service.json_body import parse_aside, query_parameters, read_body
from service.openai_bodies import Body, ChatBody, CompletionBody, addressed, in_words_of
from service.openai_messages import SCHEMA_MEMBERS
from service.openai_replies import ChatShape, CompletionShape, Shape
from service.openai_stream import stream
from service.plain_route import PlainRoute
from service.replays import Reply
from service.routes.generate import (
    circumstances_of,
    headers_of,
    once_of,
    prepared_aside,
    replied,
    serving_of,
    while_connected,
)
from service.serving import Circumstances, Prepared, Serving, answer, prepare

router = APIRouter(prefix="/v1", route_class=PlainRoute)


@router.post("/completions", dependencies=[needs("complete")])
async def completions(request: Request) -> Response:
    return await _answered(request, CompletionBody, CompletionShape)


@router.post("/chat/completions", dependencies=[needs("complete")])
async def chat_completions(request: Request) -> Response:
    return await _answered(request, ChatBody, ChatShape)


async def _answered(request: Request, body_type: type[Body], shape_type: type[Shape]) -> Response:
    """Sample, score, choose, log, reply: as `/generate`, in OpenAI's words."""
    started = monotonic()
    serving = serving_of(request)
    content = await read_body(request, serving.max_body_bytes)
    # OpenAI's clients write null for what was not said.
    body = await parse_aside(content, body_type, null_means_itself_in=SCHEMA_MEMBERS)
    around = circumstances_of(request, started, query_parameters(request, ()))
    to = addressed(body, serving.catalogue.of(around.caller.tenant), around.forced_arm, serving.n_cap)
    with in_words_of(body):
        prepared = await prepared_aside(
            request, partial(prepare, serving, to.request, around._replace(forced_arm=to.forced_arm))
        )
    if body.n > prepared.group.requested:
        raise InvalidField(f"n must be at most what the arm draws, {prepared.group.requested}", param="n")
    with in_words_of(body):
        return await _served(request, body, around, prepared, shape_type, content)


async def _served(
    request: Request, body: Body, around: Circumstances, prepared: Prepared, shape_type: type[Shape], content: bytes
) -> Response:
    serving = serving_of(request)
    shown = body.presentation(serving.tokenizer.call_format)
    prepared = prepared.with_alternatives(shown.alternatives)
    shape = shape_type(serving, prepared, shown)
    asked = once_of(request, prepared, content)
    if body.stream:
        return await stream(serving, prepared, shape, body.stream_options, request.state.request_id, asked)

    async def make() -> Reply:
        filled = await while_connected(request.receive, answer(serving, prepared, wait_for_reward=False))
        headers = headers_of(filled.group, monotonic() - around.started - filled.waited)
        return Reply(shape.reply(filled.group), headers)

    return await replied(serving, prepared, asked, make)


# --- models ----------------------------------------------------------------------------------------------


@router.get("/models", dependencies=[needs("list_models")])
async def models(request: Request) -> JSONResponse:
    """Routes first, then the policies the engine serves."""
    query_parameters(request, ())
    return JSONResponse({"object": "list", "data": list(_cards(request).values())})


@router.get("/models/{model}", dependencies=[needs("list_models")])
async def model(request: Request, model: str) -> JSONResponse:
    query_parameters(request, ())
    card = _cards(request).get(model)
    if card is None:
        raise NotFound("no such model", param="model", code="model_not_found")
    return JSONResponse(card)


def _cards(request: Request) -> dict[str, dict[str, Any]]:
    """What the caller may name as `model`."""
    caller = caller_of(request)
    snapshot = cast(Serving, request.app.state.serving).catalogue.of(caller.tenant)
    base = {route.base_policy for route in snapshot.routes.values()}
    served = [policy for policy in snapshot.policies.values() if policy.id in snapshot.served | base]
    created = {policy.id: int(policy.created_at) for policy in served}
    routes = {name: route for name, route in snapshot.routes.items() if caller.may_use(name)}
    names = {name: created.get(route.base_policy, 0) for name, route in routes.items()} | created
    return {
        name: {"id": name, "object": "model", "created": since, "owned_by": "bonsai"} for name, since in names.items()
    }
