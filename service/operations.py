"""What each operation accepts and answers: the facts of the OpenAPI document that no signature holds.

Owns: one row for each route but those of the registry (registry_operations.py). Does not own: what a row says of every
operation alike, and the document's form (openapi.py), the parsing that the rows speak of (the routes), the members of
a reply (replies.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bon_algos.contracts import POLICY_ID_PATTERN, ROUTE_PATTERN, PolicyReport
from service import headers, ledger_replies, replies
from service.curve import DEFAULT_GROUPS, DEFAULT_LOSS, MOST_GROUPS
from service.erasures import ErasureRequest
from service.errors import (
    Conflict,
    DeadlineExceeded,
    EngineBroken,
    EngineNotFound,
    EngineRefused,
    EngineUnavailable,
    ExperimentNotFound,
    Forbidden,
    InvalidField,
    KeyNotFound,
    NotAcceptable,
    NotFound,
    OverBudget,
    Overloaded,
    PolicyNotFound,
    PolicyNotServed,
    PolicyRetired,
    PreconditionFailed,
    RateLimited,
    ReportNotFound,
    RewardModelUnavailable,
    RouteNotFound,
    StoreFull,
)
from service.experiment_store import ExperimentRequest
from service.feedback import FeedbackRequest
from service.generation import GenerateRequest
from service.headers import REPLAYED
from service.keys import KeyRequest
from service.ledger_query import DEFAULT_LIMIT as PAGE_ROWS
from service.ledger_query import FIELDS
from service.ledger_query import MAX_LIMIT as PAGE_LIMIT
from service.openai_bodies import ChatBody, CompletionBody
from service.operation import MATCH, ONCE, PAGE, Body, Operation, header, query
from service.report_files import FORMATS
from service.routes.generate import MAX_UNIT_LENGTH
from service.routes.ledger import MAX_NAME, MOST
from service.routing import RouteRequest
from service.training_operations import TRAINING_OPERATIONS

ARM: Final = header(
    headers.ARM,
    "POLICY:N, forces an arm; for admins and operators.",
    pattern=f"^(base|live|{POLICY_ID_PATTERN.strip('^$')}):[0-9]{{1,6}}$",
)
UNIT: Final = header(
    headers.UNIT,
    "Whom an experiment's arm sticks to.",
    minLength=1,
    maxLength=MAX_UNIT_LENGTH,
    pattern="^[ -~]+$",
)
TIMEOUT: Final = header(
    headers.TIMEOUT,
    "Milliseconds; also in the body, as `timeout_ms`.",
    pattern="^[1-9][0-9]*$",
)
TOLD: Final = (
    *(ARM, UNIT, TIMEOUT, ONCE),
    header("traceparent", "The caller's trace (W3C): goes along with what is asked of engines and reward models."),
    header("tracestate", "Goes along with it."),
)
"""Headers of a completion."""
COMPLETING: Final = (
    RouteNotFound,
    Conflict,
    RateLimited,
    OverBudget,
    EngineBroken,
    EngineRefused,
    EngineUnavailable,
    RewardModelUnavailable,
    PolicyNotServed,
    PolicyRetired,
    Overloaded,
    DeadlineExceeded,
    StoreFull,
)

OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("POST", "/generate"): Operation(
        "The best of n completions",
        {200: replies.GENERATION},
        Body(GenerateRequest, {"prompt": "A good review begins:", "n": 4, "max_tokens": 16}, nulls="refused"),
        (query("n", "Candidates drawn; also in the body.", type="integer", minimum=1), *TOLD),
        COMPLETING,
        headers=(REPLAYED,),
    ),
    ("POST", "/v1/completions"): Operation(
        "OpenAI's completions, best-of-n",
        {200: replies.COMPLETION},
        Body(
            CompletionBody, {"model": "default", "prompt": "A good review begins:", "max_tokens": 16}, nulls="left out"
        ),
        TOLD,
        COMPLETING,
        headers=(REPLAYED,),
        streams=True,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "OpenAI's chat completions, best-of-n",
        {200: replies.CHAT_COMPLETION},
        Body(
            ChatBody,
            {"model": "default", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16},
            nulls="left out",
        ),
        TOLD,
        COMPLETING,
        headers=(REPLAYED,),
        streams=True,
    ),
    ("GET", "/v1/models"): Operation(
        "What `model` may name", {200: replies.listed(replies.MODEL, is_paged=False)}, errors=(InvalidField,)
    ),
    ("GET", "/v1/models/{model}"): Operation(
        "A route or a policy as a model", {200: replies.MODEL}, errors=(NotFound, InvalidField)
    ),
    ("POST", "/v1/feedback"): Operation(
        "What somebody thinks of an answer",
        {201: replies.FEEDBACK},
        Body(
            FeedbackRequest,
            {"response": "resp_" + "0" * 32, "value": True, "comment": "To the point."},
            nulls="left out",
        ),
        (ONCE,),
        (NotFound, Conflict, StoreFull),
    ),
    ("GET", "/v1/feedback"): Operation(
        "The feedback that counts",
        {200: replies.listed(replies.FEEDBACK)},
        parameters=(
            query("response", "The id of a reply; this or session.", type="string"),
            query("session", "`metadata.session` of some requests; this or response.", type="string"),
        ),
        errors=(NotFound, InvalidField),
    ),
    ("GET", "/health"): Operation("Whether the process answers", {200: replies.HEALTH}),
    ("GET", "/ready"): Operation("Whether requests would be answered", {200: replies.READY, 503: replies.READY}),
    ("GET", "/version"): Operation("Which version this is", {200: replies.VERSION}),
    ("GET", "/routes"): Operation(
        "All routes", {200: replies.listed(replies.ROUTE)}, parameters=PAGE, errors=(InvalidField,)
    ),
    ("GET", "/routes/{route}"): Operation("A route", {200: replies.ROUTE}, errors=(RouteNotFound,), headers=("ETag",)),
    ("GET", "/routes/{route}/curve"): Operation(
        "What best-of-k would have earned, k from 1 to n",
        {200: replies.CURVE},
        parameters=(
            query("groups", "The newest.", type="integer", minimum=1, maximum=MOST_GROUPS, default=DEFAULT_GROUPS),
            query("n", "Left out: the most frequent n.", type="integer", minimum=2),
            query("loss", "Share of the gain.", type="number", minimum=0, maximum=1, default=DEFAULT_LOSS),
        ),
        errors=(RouteNotFound, Conflict, InvalidField),
    ),
    ("GET", "/routes/{route}/strategy"): Operation(
        "What the route's strategy has learned", {200: replies.STRATEGY}, errors=(RouteNotFound,)
    ),
    ("PUT", "/routes/{route}"): Operation(
        "Make or change a route",
        {200: replies.ROUTE, 201: replies.ROUTE},
        Body(RouteRequest, {"default_n": 8, "strategy": "adaptive"}),
        (MATCH,),
        (Conflict, PreconditionFailed, StoreFull),
        headers=("ETag",),
    ),
    ("DELETE", "/routes/{route}"): Operation(
        "Delete a route",
        {204: None},
        parameters=(MATCH,),
        errors=(RouteNotFound, Conflict, PreconditionFailed, StoreFull),
    ),
    ("POST", "/routes/{route}/rollback"): Operation(
        "Back to what was live before",
        {200: replies.ROUTE},
        parameters=(ONCE, MATCH),
        errors=(RouteNotFound, Conflict, PreconditionFailed, StoreFull, InvalidField),
        headers=("ETag",),
    ),
    ("GET", "/policies/{policy_id}/report"): Operation(
        "The whole report of a policy on held-out prompts",
        {200: PolicyReport, 304: None},
        parameters=(
            query("format", "Left out: the one that Accept likes best.", type="string", enum=[*FORMATS]),
            header("If-None-Match", "An ETag: 304 while the report is that one."),
        ),
        errors=(PolicyNotFound, ReportNotFound, NotAcceptable, InvalidField),
        headers=("ETag",),
        also=tuple(media for media in FORMATS.values() if media != "application/json"),
    ),
    **TRAINING_OPERATIONS,
    ("PUT", "/experiments/{route}"): Operation(
        "Start an experiment or raise a weight",
        {200: replies.EXPERIMENT},
        Body(
            ExperimentRequest,
            {"arms": [{"policy": "base", "n": 16, "weight": 9000}, {"policy": "base", "n": 4, "weight": 1000}]},
        ),
        (MATCH,),
        (RouteNotFound, PreconditionFailed, StoreFull),
        headers=("ETag",),
    ),
    ("GET", "/experiments/{route}"): Operation(
        "A route's experiment and what it showed",
        {200: replies.EXPERIMENT},
        errors=(ExperimentNotFound,),
        headers=("ETag",),
    ),
    ("DELETE", "/experiments/{route}"): Operation(
        "Stop an experiment",
        {200: replies.EXPERIMENT},
        parameters=(MATCH,),
        errors=(ExperimentNotFound, Conflict, PreconditionFailed, StoreFull),
        headers=("ETag",),
    ),
    ("GET", "/engines"): Operation(
        "The policy engines", {200: replies.listed(replies.ENGINE)}, parameters=PAGE, errors=(InvalidField, Forbidden)
    ),
    ("POST", "/engines/{name}/drain"): Operation(
        "Take an engine out of rotation", {200: replies.ENGINE}, errors=(EngineNotFound,)
    ),
    ("POST", "/engines/{name}/undrain"): Operation(
        "Put it back into rotation", {200: replies.ENGINE}, errors=(EngineNotFound,)
    ),
    ("POST", "/keys"): Operation(
        "Make a key, which is shown this once",
        {201: replies.NEW_KEY},
        Body(KeyRequest, {"name": "the web shop", "role": "inference"}),
        errors=(Conflict, StoreFull),
        headers=("Location",),
    ),
    ("GET", "/keys"): Operation(
        "All keys, without the keys", {200: replies.listed(replies.KEY)}, parameters=PAGE, errors=(InvalidField,)
    ),
    ("GET", "/keys/{key_id}"): Operation("A key, without the key", {200: replies.KEY}, errors=(KeyNotFound,)),
    ("DELETE", "/keys/{key_id}"): Operation(
        "Revoke a key", {200: replies.KEY}, errors=(KeyNotFound, Conflict, StoreFull)
    ),
    ("GET", "/ledger"): Operation(
        "What was logged, newest first",
        {200: ledger_replies.LEDGER_PAGE},
        parameters=(
            query("route", "Of this route.", type="string", pattern=ROUTE_PATTERN),
            query("policy", "Drawn or answered by this policy.", type="string", pattern=POLICY_ID_PATTERN),
            query("since", "Made at or after, seconds since the epoch.", type="number", minimum=0, maximum=MOST),
            query("until", "Made at or before.", type="number", minimum=0, maximum=MOST),
            query("user", "Asked for by this user.", type="string", minLength=1, maxLength=MAX_NAME),
            query("session", "Of this session.", type="string", minLength=1, maxLength=MAX_NAME),
            query("has_feedback", "Whether somebody said something about it.", type="boolean"),
            query("min_reward", "Of what was served.", type="number", minimum=-MOST, maximum=MOST),
            query("limit", "Rows.", type="integer", minimum=1, maximum=PAGE_LIMIT, default=PAGE_ROWS),
            query("cursor", "`next_cursor` of the page before, with the same filters.", type="string", minLength=1),
            query("fields", f"Some of {', '.join(FIELDS)}, with commas between.", type="string", minLength=1),
        ),
        errors=(InvalidField,),
    ),
    ("POST", "/ledger/erasures"): Operation(
        "Have what one user left erased",
        {202: ledger_replies.ERASURE},
        Body(ErasureRequest, {"user": "customer-4711"}),
        (ONCE,),
        (StoreFull,),
        headers=("Location",),
    ),
    ("GET", "/ledger/erasures/{erasure_id}"): Operation(
        "How far an erasure is", {200: ledger_replies.ERASURE}, errors=(NotFound,)
    ),
    ("GET", "/openapi.json"): Operation("This document", {200: replies.DOCUMENT}),
}
