"""A thin asynchronous client of the public HTTP API.

Owns the requests, what of their replies a caller of ours reads, the errors, and waiting where the gateway says
Retry-After. Does not own load or statistics. A field of a reply that is not named here is ignored, so that the
gateway may grow.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final, Literal, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
from pydantic import BaseModel, ValidationError

from bon_algos.contracts import (
    CircleSpec,
    FingerprintResult,
    Interval,
    JobSpec,
    Manifest,
    PolicyReport,
    PolicyState,
    Turn,
)
from bonsai.engine_replies import Engine, EnginePage
from bonsai.generation_replies import Generation
from bonsai.job_replies import DryRun, Job, JobEvent, JobPage, Reply
from bonsai.webhook_replies import Webhook, WebhookAttempts, WebhookPage, WebhookTest
from service.headers import ARM, LAST_EVENT_ID, UNIT

_Reply = TypeVar("_Reply", bound=BaseModel)

RECONNECT_SECONDS: Final = 1.0
SILENT_SECONDS: Final = 30.0
"""A stream of events has a comment every 10 s."""
WEBHOOKS = "/v1/webhook_endpoints"
_EXPORT: Final = aiohttp.ClientTimeout(sock_connect=10, sock_read=600)
"""As long as something comes. Before the first byte the gateway has read them all and checked their digests."""
_NOT_NOW = (429, 503)
"""What a gateway answers that has done nothing yet and says when to come again."""


class BonsaiError(Exception):
    """Base of what a call can meet."""


class GatewayUnreachable(BonsaiError):
    """No reply: nobody listens there, or the connection broke."""


class UnreadableReply(BonsaiError):
    """A reply that this client does not understand: another version, or something else listens there."""


class RequestRefused(BonsaiError):
    """The gateway answered with an error; its message says what to change."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})"


class Policy(Reply):
    """A policy as the registry knows it."""

    id: str
    state: PolicyState
    served: bool
    """Whether the engine has proved, since its last start, that it serves this policy."""
    fingerprint: FingerprintResult | None
    manifest: Manifest | None
    """None for a base policy."""


class ArmSummary(Reply):
    """What an experiment has seen of one arm."""

    arm: str
    weight: int
    exposures: int
    answers: int
    reward: Interval | None = None
    candidate_tokens_per_answer: float | None = None


class ExperimentSummary(Reply):
    id: str
    route: str
    arms: tuple[ArmSummary, ...]


class CircleSpent(Reply):
    """In the last 24 hours, and how far the live policy is from the first reference, nats."""

    jobs: int
    gpu_seconds: float
    kl_base: float
    kl_base_foreseen: float


class RunningCircle(Reply):
    """A route that distils itself again and again."""

    route: str
    status: Literal["running", "stopped"]
    reason: str
    live_policy: str | None
    turn: Turn | None
    turns: tuple[Turn, ...]
    spent: CircleSpent


class _Circles(Reply):
    data: list[RunningCircle]


class BonsaiClient:
    """Calls of the public API; one connection pool. Made by `open_client`."""

    def __init__(self, session: aiohttp.ClientSession, patience_seconds: float) -> None:
        self._session = session
        self._patience_seconds = patience_seconds

    async def generate(
        self,
        prompt: str,
        *,
        n: int | None = None,
        arm: str | None = None,
        unit: str | None = None,
        **fields: Any,
    ) -> Generation:
        """One answer. `arm` forces `POLICY:N`; `fields` are members of the body (`wait_for_reward`, `store`, …)."""
        headers = {ARM: arm, UNIT: unit}
        return await self._call(
            Generation,
            "POST",
            "/generate" if n is None else f"/generate?n={n}",
            {"prompt": prompt, **fields},
            {name: value for name, value in headers.items() if value is not None},
        )

    async def distill(self, spec: JobSpec) -> Job:
        return await self._call(Job, "POST", "/distill", spec.model_dump(mode="json", exclude_none=True))

    async def dry_run(self, spec: JobSpec) -> DryRun:
        body = spec.model_dump(mode="json", exclude_none=True)
        return await self._call(DryRun, "POST", "/distill?dry_run=true", body)

    async def job(self, job_id: str) -> Job:
        return await self._call(Job, "GET", f"/distill/{job_id}")

    async def jobs(self, *, limit: int, after: str | None = None) -> JobPage:
        """Newest first."""
        query = f"?limit={limit}" if after is None else f"?limit={limit}&after={quote(after, safe='')}"
        return await self._call(JobPage, "GET", f"/distill{query}")

    async def ask_job(self, wish: Literal["pause", "resume", "cancel"], job_id: str) -> Job:
        return await self._call(Job, "POST", f"/distill/{job_id}/{wish}")

    async def events(self, job_id: str) -> AsyncIterator[JobEvent]:
        """What the job went through and goes through, until it has ended. A connection that breaks, or a gateway that
        restarts, is asked again for what follows on the last event."""
        last, give_up = "0-0", monotonic() + self._patience_seconds
        while True:
            try:
                async for event in self._events_after(job_id, last):
                    yield event
                    last, give_up = event.id, monotonic() + self._patience_seconds
                if (await self.job(job_id)).is_final:
                    return
            except GatewayUnreachable:
                if monotonic() > give_up:
                    raise
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _events_after(self, job_id: str, last: str) -> AsyncIterator[JobEvent]:
        path = f"/distill/{job_id}/events?stream=true"
        timeout = aiohttp.ClientTimeout(sock_connect=10, sock_read=SILENT_SECONDS)
        try:
            async with self._session.get(path, headers={LAST_EVENT_ID: last}, timeout=timeout) as response:
                if response.status >= 400:
                    raise _refusal(response.status, await response.read())
                async for line in response.content:
                    if line.startswith(b"data: ") and b'"fine_tuning.job.event"' in line:
                        yield JobEvent.model_validate_json(line.removeprefix(b"data: "))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise GatewayUnreachable(f"GET {path}: {error or type(error).__name__}") from error

    async def policy(self, policy_id: str) -> Policy:
        return await self._call(Policy, "GET", f"/policies/{policy_id}")

    async def report(self, policy_id: str) -> PolicyReport:
        """The whole one, of which a policy's manifest has the summary."""
        return await self._call(PolicyReport, "GET", f"/policies/{policy_id}/report?format=json")

    async def report_file(self, policy_id: str, form: Literal["json", "markdown", "png"]) -> bytes:
        """The same as it was written."""
        return await self._exchange("GET", f"/policies/{policy_id}/report?format={form}")

    async def promote(self, policy_id: str, *, route: str, override_reason: str) -> None:
        body = {"route": route, "override_reason": override_reason}
        await self._call(Reply, "POST", f"/policies/{policy_id}/promote", body)

    async def put_circle(self, route: str, spec: CircleSpec) -> RunningCircle:
        return await self._call(RunningCircle, "PUT", f"/routes/{route}/circle", spec.model_dump(exclude_unset=True))

    async def circle(self, route: str) -> RunningCircle:
        return await self._call(RunningCircle, "GET", f"/routes/{route}/circle")

    async def circles(self) -> list[RunningCircle]:
        return (await self._call(_Circles, "GET", "/circles?limit=100")).data

    async def ask_circle(self, wish: Literal["start", "stop"], route: str) -> RunningCircle:
        return await self._call(RunningCircle, "POST", f"/routes/{route}/circle/{wish}")

    async def stop_circles(self) -> list[RunningCircle]:
        """All of them."""
        return (await self._call(_Circles, "POST", "/circles/stop")).data

    async def engines(self) -> list[Engine]:
        return (await self._call(EnginePage, "GET", "/engines?limit=100")).data

    async def register_policy(self, digest: str) -> Policy:
        """An adapter that was put below the artefact root becomes a candidate."""
        return await self._call(Policy, "POST", "/policies", {"digest": digest})

    def export_policy(self, policy_id: str, base: str) -> AsyncGenerator[bytes]:
        """A tar archive of its directory, in pieces: whole weights need not fit into memory. base: what an adapter says
        of its base model."""
        return self._pieces("GET", f"/policies/{policy_id}/export?{urlencode({'base': base})}", timeout=_EXPORT)

    async def add_webhook(self, url: str, event_types: Sequence[str], name: str) -> Webhook:
        """With its secret, which no other reply but a rotation's has."""
        body = {"name": name, "url": url, "event_types": list(event_types)}
        return await self._call(Webhook, "POST", WEBHOOKS, body)

    async def webhooks(self) -> list[Webhook]:
        return (await self._call(WebhookPage, "GET", f"{WEBHOOKS}?limit=100")).data

    async def remove_webhook(self, webhook_id: str) -> None:
        await self._call(Reply, "DELETE", _webhook(webhook_id))

    async def test_webhook(self, webhook_id: str, event_type: str) -> WebhookTest:
        return await self._call(WebhookTest, "POST", f"{_webhook(webhook_id)}/test", {"event_type": event_type})

    async def rotate_webhook(self, webhook_id: str, *, keeps_former: bool) -> Webhook:
        """With its new secret."""
        body = {"keep_old_secret_active_for_24_hours": keeps_former}
        return await self._call(Webhook, "POST", f"{_webhook(webhook_id)}/rotate_secret", body)

    async def webhook_attempts(self, webhook_id: str, *, limit: int) -> WebhookAttempts:
        """Newest first."""
        return await self._call(WebhookAttempts, "GET", f"{_webhook(webhook_id)}/deliveries?limit={limit}")

    async def start_experiment(self, route: str, weights: Mapping[tuple[str, int], int]) -> None:
        """Weights of the arms (policy, n), together 10,000."""
        arms = [{"policy": policy, "n": n, "weight": weight} for (policy, n), weight in weights.items()]
        await self._call(Reply, "PUT", f"/experiments/{route}", {"arms": arms})

    async def experiment(self, route: str) -> ExperimentSummary:
        return await self._call(ExperimentSummary, "GET", f"/experiments/{route}")

    async def stop_experiment(self, route: str) -> None:
        await self._call(Reply, "DELETE", f"/experiments/{route}")

    async def _call(
        self,
        reply: type[_Reply],
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Reply:
        content = await self._exchange(method, path, body, headers)
        try:
            return reply.model_validate_json(content or b"{}")
        except ValidationError as error:
            raise UnreadableReply(f"{method} {path}: {error}") from error

    async def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        return b"".join([piece async for piece in self._pieces(method, path, json=body, headers=headers)])

    async def _pieces(self, method: str, path: str, **asked: Any) -> AsyncGenerator[bytes]:
        """The reply's content as it comes; asked: what the session is told besides."""
        give_up = monotonic() + self._patience_seconds
        while True:
            try:
                async with self._session.request(method, path, **asked) as response:
                    pause = response.headers.get("Retry-After", "")
                    is_later = response.status in _NOT_NOW and pause.isdigit() and monotonic() + int(pause) <= give_up
                    if not is_later:
                        if response.status >= 400:
                            raise _refusal(response.status, await response.read())
                        async for piece in response.content.iter_any():
                            yield piece
                        return
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise GatewayUnreachable(f"{method} {path}: {error or type(error).__name__}") from error
            await asyncio.sleep(int(pause))


class _ErrorMembers(Reply):
    code: str | None = None
    message: str = ""


class _ErrorBody(Reply):
    error: _ErrorMembers


def _webhook(webhook_id: str) -> str:
    return f"{WEBHOOKS}/{quote(webhook_id, safe='')}"


def _refusal(status: int, content: bytes) -> RequestRefused:
    try:
        error = _ErrorBody.model_validate_json(content).error
    except ValidationError:
        return RequestRefused(status, "unknown", content[:200].decode(errors="replace"))
    return RequestRefused(status, error.code or "unknown", error.message)


@asynccontextmanager
async def open_client(
    base_url: str,
    *,
    api_key: str | None = None,
    timeout_seconds: float = 120.0,
    patience_seconds: float = 60.0,
) -> AsyncIterator[BonsaiClient]:
    """A client of the gateway at `base_url` (http://HOST:PORT), with as many connections as calls at one time.

    api_key: None takes the environment variable BONSAI_API_KEY.

    A call that is answered "not now" (429 or 503 with Retry-After) is sent again after the pause the gateway names,
    until `patience_seconds` have passed.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    # The gateway closes a connection that idles for seconds. Dropping it earlier here means that no request is ever
    # sent into one that is being closed.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1.0)
    key = os.environ.get("BONSAI_API_KEY", "") if api_key is None else api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector, headers=headers) as session:
        yield BonsaiClient(session, patience_seconds)
