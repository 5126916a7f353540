"""Every failure with an HTTP meaning, and the one place that renders it.

Owns: the tree below, the wire body (RFC 9457 members plus the OpenAI `error` object), `Retry-After`.
Does not own: when a failure happens. Foreign exceptions are translated in the client that meets them.

    GatewayError                    500  internal
    ├── Unparseable                 400  unparseable            not JSON, or JSON nobody reads the same way twice
    ├── Unauthenticated             401  invalid_key            + WWW-Authenticate; missing, expired or revoked: `code`
    ├── Forbidden                   403  role_insufficient      a key that may not; the message names what is needed
    ├── NotFound                    404  not_found
    │   ├── RouteNotFound                route_not_found
    │   ├── PolicyNotFound               policy_not_found
    │   ├── TagNotFound                  tag_not_found
    │   ├── JobNotFound                  job_not_found
    │   ├── CircleNotFound               circle_not_found
    │   ├── ExperimentNotFound           experiment_not_found
    │   ├── EngineNotFound               engine_not_found
    │   ├── ReportNotFound               report_not_found
    │   ├── FileNotFound                 file_not_found
    │   ├── WebhookNotFound              webhook_not_found
    │   └── KeyNotFound                  key_not_found
    ├── MethodNotAllowed            405  method_not_allowed
    ├── NotAcceptable               406  not_acceptable         no form of it that the caller takes
    ├── BodyTimeout                 408  body_timeout
    ├── HeadersTimeout              408  headers_timeout
    ├── Conflict                    409  conflict               the state forbids it now; `code` says why
    ├── PolicyRetired               410  policy_retired         and no engine has it any more
    ├── PreconditionFailed          412  precondition_failed    `If-Match` names another version
    ├── BodyTooLarge                413  body_too_large
    ├── UnsupportedMediaType        415  unsupported_media_type
    ├── InvalidField                422  invalid_field          parsed, and one field is wrong: `param` names it
    ├── ReceiverUnreached           424  receiver_unreached     a webhook's receiver gave no answer to a test
    ├── RateLimited                 429  rate_limited           one key has used up what it may; + Retry-After
    │   ├── OverBudget                   over_budget            this request alone is more than that
    │   └── QueueFull                    queue_full             a tenant has as many jobs as it may
    ├── TooManyWrongKeys            429  too_many_wrong_keys    + Retry-After
    ├── HeadersTooLarge             431  headers_too_large
    ├── ClientGone                  499  client_gone            never sent: nobody is there to read it
    ├── EngineBroken                502  engine_broken          an engine accepted and then did not deliver
    │   ├── AnswerTooLong                engine_broken          longer than we read
    │   └── EngineRefused                engine_refused         it did not take a request of ours
    ├── Unavailable                 503  unavailable            + Retry-After
    │   ├── Overloaded                   overloaded             too many requests of everybody
    │   ├── ShuttingDown                 shutting_down
    │   ├── EngineUnavailable            engine_unavailable
    │   ├── RewardModelUnavailable       reward_model_unavailable
    │   ├── PolicyNotServed              policy_not_served
    │   └── StoreUnavailable             store_unavailable      Redis
    ├── DeadlineExceeded            504  deadline_exceeded
    └── StoreFull                   507  store_full             Redis has no memory left (noeviction)

Messages name the field, the limit and the kind of what was sent. They never repeat what was sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar

from starlette.responses import Response

PROBLEM_JSON = "application/problem+json"
MAX_BODY_BYTES = 4096
"""No error body is longer."""
OPENAI_RATE_LIMIT = "rate_limit_exceeded"
"""What clients of OpenAI's API look for; our own code stands in `type`."""


class GatewayError(Exception):
    """Base of every failure with an HTTP meaning.

    message: for the caller, one sentence. param: path of the field at fault, `messages[0].content`.
    code: overrides the class's code where one class covers several causes (`Conflict`).
    facts: further JSON members of the body, for instance how many candidates had finished.
    """

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal"
    retry_after: int | None = None
    """Seconds; sent as `Retry-After`."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.facts = dict(facts or {})


class Unparseable(GatewayError):
    status, default_code = 400, "unparseable"


class Unauthenticated(GatewayError):
    status, default_code = 401, "invalid_key"


class Forbidden(GatewayError):
    status, default_code = 403, "role_insufficient"


class NotFound(GatewayError):
    status, default_code = 404, "not_found"


class RouteNotFound(NotFound):
    default_code = "route_not_found"


class PolicyNotFound(NotFound):
    default_code = "policy_not_found"


class TagNotFound(NotFound):
    default_code = "tag_not_found"


class JobNotFound(NotFound):
    default_code = "job_not_found"


class CircleNotFound(NotFound):
    default_code = "circle_not_found"


class ExperimentNotFound(NotFound):
    default_code = "experiment_not_found"


class EngineNotFound(NotFound):
    default_code = "engine_not_found"


class FileNotFound(NotFound):
    default_code = "file_not_found"


class WebhookNotFound(NotFound):
    default_code = "webhook_not_found"


class KeyNotFound(NotFound):
    default_code = "key_not_found"


class ReportNotFound(NotFound):
    default_code = "report_not_found"


class MethodNotAllowed(GatewayError):
    status, default_code = 405, "method_not_allowed"


class NotAcceptable(GatewayError):
    status, default_code = 406, "not_acceptable"


class BodyTimeout(GatewayError):
    status, default_code = 408, "body_timeout"


class HeadersTimeout(GatewayError):
    status, default_code = 408, "headers_timeout"


class Conflict(GatewayError):
    status, default_code = 409, "conflict"


class PolicyRetired(GatewayError):
    status, default_code = 410, "policy_retired"


class PreconditionFailed(GatewayError):
    status, default_code = 412, "precondition_failed"


class BodyTooLarge(GatewayError):
    status, default_code = 413, "body_too_large"


class UnsupportedMediaType(GatewayError):
    status, default_code = 415, "unsupported_media_type"


class InvalidField(GatewayError):
    status, default_code = 422, "invalid_field"


class ReceiverUnreached(GatewayError):
    # No 5xx, after which OpenAI's clients would try again by themselves.
    status, default_code = 424, "receiver_unreached"


class RateLimited(GatewayError):
    status, default_code = 429, "rate_limited"
    retry_after = 1


class OverBudget(RateLimited):
    default_code = "over_budget"


class QueueFull(RateLimited):
    default_code = "queue_full"
    retry_after = 60


class TooManyWrongKeys(GatewayError):
    status, default_code = 429, "too_many_wrong_keys"
    retry_after = 1


class HeadersTooLarge(GatewayError):
    status, default_code = 431, "headers_too_large"


class ClientGone(GatewayError):
    status, default_code = 499, "client_gone"


class EngineBroken(GatewayError):
    status, default_code = 502, "engine_broken"


class AnswerTooLong(EngineBroken):
    """Of an engine's code: a caller need not tell it from other broken answers."""


class EngineRefused(EngineBroken):
    default_code = "engine_refused"


class Unavailable(GatewayError):
    status, default_code = 503, "unavailable"
    retry_after = 1


class Overloaded(Unavailable):
    default_code = "overloaded"


class ShuttingDown(Unavailable):
    default_code = "shutting_down"


class EngineUnavailable(Unavailable):
    default_code = "engine_unavailable"


class RewardModelUnavailable(Unavailable):
    default_code = "reward_model_unavailable"


class PolicyNotServed(Unavailable):
    default_code = "policy_not_served"
    retry_after = 5


class StoreUnavailable(Unavailable):
    default_code = "store_unavailable"


class DeadlineExceeded(GatewayError):
    status, default_code = 504, "deadline_exceeded"


class StoreFull(GatewayError):
    status, default_code = 507, "store_full"


def render(error: GatewayError, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """The wire form of a failure, at most MAX_BODY_BYTES long."""
    body = json.dumps(problem(error, request_id)).encode()
    if len(body) > MAX_BODY_BYTES:
        body = json.dumps(problem(_without_facts(error), request_id)).encode()
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["Retry-After"] = str(error.retry_after)
    if error.status == Unauthenticated.status:
        sent["WWW-Authenticate"] = "Bearer"
    return Response(body, status_code=error.status, headers=sent, media_type=PROBLEM_JSON)


def problem(error: GatewayError, request_id: str) -> dict[str, object]:
    """The body: RFC 9457 members, and `error` as OpenAI's clients read it. No fact replaces one of them."""
    return {
        **error.facts,
        "type": f"urn:bonsai:error:{error.code}",
        "title": _title(error.status),
        "status": error.status,
        "detail": error.message,
        "instance": f"urn:bonsai:request:{request_id}",
        "error": {
            "message": error.message,
            "type": _openai_type(error.status),
            "param": error.param,
            "code": OPENAI_RATE_LIMIT if error.status == RateLimited.status else error.code,
        },
    }


def _openai_type(status: int) -> str:
    if status == RateLimited.status:
        return OPENAI_RATE_LIMIT
    return "invalid_request_error" if status < 500 else "server_error"


def _title(status: int) -> str:
    return "Client Closed Request" if status == ClientGone.status else HTTPStatus(status).phrase


def _without_facts(error: GatewayError) -> GatewayError:
    param = error.param if error.param is None else error.param[:200]
    short = type(error)(error.message[:500], param=param, code=error.code)
    short.retry_after = error.retry_after
    return short
