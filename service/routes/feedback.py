"""`/v1/feedback`: what people think of an answer, and what counts of it."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.access import caller_of, needs
from service.errors import InvalidField
from service.feedback import FeedbackBook, FeedbackRequest, feedback_object
from service.headers import IDEMPOTENCY_KEY
from service.idempotency import Idempotency
from service.json_body import parse_aside, query_parameters, read_body
from service.replays import Reply
from service.routes.admin import list_of
from service.serving import Serving

SECONDS = 10.0
router = APIRouter(prefix="/v1/feedback")


@router.post("", dependencies=[needs("complete")])
async def record(request: Request) -> Response:
    query_parameters(request, ())
    serving = cast(Serving, request.app.state.serving)
    content = await read_body(request, serving.max_body_bytes)
    asked = await parse_aside(content, FeedbackRequest, null_means_itself_in=())

    caller = caller_of(request)

    async def make() -> Reply:
        return Reply(feedback_object(await _book(request).record(asked, caller)), {})

    key = request.headers.get(IDEMPOTENCY_KEY)
    idempotency = Idempotency.of(key, "POST /v1/feedback", content.decode(), caller.tenant)
    reply = await serving.replays.once(idempotency, SECONDS, make)
    return JSONResponse(reply.body, 201, headers=reply.headers)


@router.get("", dependencies=[needs("read_content")])
async def that_counts(request: Request) -> JSONResponse:
    query = query_parameters(request, ("response", "session"))
    if len(query) != 1:
        raise InvalidField("exactly one of response and session is required", param="response")
    rows = await _book(request).that_counts(query.get("response"), query.get("session"), caller_of(request))
    return list_of([feedback_object(one) for one in rows], has_more=False)


def _book(request: Request) -> FeedbackBook:
    return cast(Serving, request.app.state.serving).feedback
