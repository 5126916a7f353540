"""What webhooks are told: the types of events, and how one is made of a job's move or an entry of the audit.

Owns: the types, the form of an event (OpenAI's), what of the audit is one, samples. Does not own: where moves and
entries come from and who is told (webhook_outbox.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from uuid_utils import uuid7

from bon_algos.contracts import PolicyState

EventType = Literal[
    "fine_tuning.job.running",
    "fine_tuning.job.paused",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "bonsai.policy.candidate",
    "bonsai.policy.shadow",
    "bonsai.policy.canary",
    "bonsai.policy.live",
    "bonsai.policy.retired",
    "bonsai.policy.failed",
]
"""What a webhook can ask for. The jobs' names are OpenAI's, as far as it has them."""
SAMPLE_JOB: Final = "job_sample"
SAMPLE_POLICY: Final = "policy_sample"
"""Ids that nothing has: who asks for more about a sample finds nothing, and does nothing."""
_TYPES: Final = frozenset(get_args(EventType))
_OF_ONE: Final = frozenset({"policy_failed", "policy_import", "retire"})
"""Entries about one policy, which change nothing of a route."""
_STATES: Final = frozenset(get_args(PolicyState))


class Event(NamedTuple):
    id: str
    """Under which a receiver knows one that it had before: the same in every attempt and for every webhook."""
    type: str
    body: str


class PolicyChange(NamedTuple):
    policy: str
    route: str | None
    """On which it came about; None where it was on none."""
    former: PolicyState | None
    state: PolicyState


def event_of(kind: str, at: float, data: Mapping[str, Any]) -> Event:
    """at: when it happened, Unix seconds."""
    event_id = f"evt_{uuid7().hex}"
    told = {"id": event_id, "object": "event", "type": kind, "created_at": int(at), "data": dict(data)}
    return Event(event_id, kind, json.dumps(told, separators=(",", ":")))


def job_event(place: str, fields: Mapping[str, str]) -> Event | None:
    """Of a move of a job; None for one that nobody can ask for. place: in the stream, which has Redis' time."""
    kind = f"fine_tuning.job.{fields['state']}"
    return event_of(kind, _at(place), {"id": fields["job"]}) if kind in _TYPES else None


def policy_event(place: str, change: PolicyChange) -> Event:
    data = {"id": change.policy, "route": change.route, "from": change.former, "to": change.state}
    return event_of(f"bonsai.policy.{change.state}", _at(place), data)


def sample_event(kind: EventType, at: float) -> Event:
    """One that nothing has happened for, in the form of those that it is a sample of."""
    *_, subject, state = kind.split(".")
    if subject == "job":
        return event_of(kind, at, {"id": SAMPLE_JOB})
    former = "canary" if state == "candidate" else "candidate"
    return event_of(kind, at, {"id": SAMPLE_POLICY, "route": None, "from": former, "to": state})


def policy_changes(entry: Mapping[str, str]) -> Iterator[PolicyChange]:
    """The policies that are in another state for what this entry of the audit tells."""
    try:
        data = json.loads(entry.get("data", "null"))
    except ValueError:
        return
    if not isinstance(data, dict):
        return
    for policy, (former, state) in data.get("states", {}).items():
        yield PolicyChange(policy, data["route"], former, state)
    if entry["event"] in _OF_ONE:
        former, state = _state(data.get("before")), _state(data.get("after"))
        if state is not None and state != former:
            yield PolicyChange(entry["policy"], None, former, state)


def _state(said: Any) -> PolicyState | None:
    """A state, by itself or among what else is told of the policy."""
    found = said.get("state") if isinstance(said, dict) else said
    return cast(PolicyState, found) if isinstance(found, str) and found in _STATES else None


def _at(place: str) -> float:
    return int(place.partition("-")[0]) / 1000
