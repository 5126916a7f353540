"""The form of every reply, as JSON Schema.

Owns: the members of the objects that the API answers with. Does not own: filling them (the `…_object` functions), the
form of an error (errors.py). A Record in here stands for its own serialised form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias, get_args

from pydantic import BaseModel

from bon_algos.contracts import (
    Feedback,
    Interval,
    Route,
    Strategy,
)
from service.keys import KeyRecord


class Named(NamedTuple):
    """A schema that stands in the document once."""

    name: str
    schema: Mapping[str, Any] | Shown


class Shown(NamedTuple):
    """A record as an object that lacks some of its members and has others beside them."""

    record: type[BaseModel]
    without: tuple[str, ...]
    more: Mapping[str, Any]


Schema: TypeAlias = "Mapping[str, Any] | type[BaseModel] | Named | None"
"""None: no content."""

TEXT: Final = {"type": "string"}
WHOLE: Final = {"type": "integer"}
NUMBER: Final = {"type": "number"}
FLAG: Final = {"type": "boolean"}
COUNTS: Final = {"type": "object", "additionalProperties": WHOLE}


def maybe(schema: Schema) -> Mapping[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def rows(schema: Schema) -> Mapping[str, Any]:
    return {"type": "array", "items": schema}


def kind(name: str) -> Mapping[str, Any]:
    """What `object` says."""
    return {"const": name}


def one_of(names: object) -> Mapping[str, Any]:
    """The values of a Literal."""
    return {"enum": [*get_args(names)]}


def members(optional: Mapping[str, Schema] | None = None, /, **required: Schema) -> Mapping[str, Any]:
    """An object with these members."""
    return {"type": "object", "required": [*required], "properties": {**required, **(optional or {})}}


def listed(row: Schema, *, is_paged: bool = True) -> Mapping[str, Any]:
    """A list as OpenAI's clients read it."""
    page = {"first_id": maybe(TEXT), "last_id": maybe(TEXT), "has_more": FLAG} if is_paged else {}
    return members(object=kind("list"), data=rows(row), **page)


# --- completions -----------------------------------------------------------------------------------------

CANDIDATE_COUNTS: Final = Named(
    "CandidateCounts", members(requested=WHOLE, finished=WHOLE, scored=WHOLE, failed=COUNTS)
)
SELECTION: Final = Named(
    "Selection",
    members(
        status=TEXT,
        strategy=one_of(Strategy),
        stop_reason=TEXT,
        reward_model=TEXT,
        reward=maybe(NUMBER),
        disagreement=maybe(NUMBER),
        margin=maybe(NUMBER),
        given_up=maybe(NUMBER),
        tokens_saved=WHOLE,
    ),
)
CANDIDATE: Final = Named(
    "Candidate",
    members(
        index=WHOLE,
        policy=TEXT,
        text=TEXT,
        reward=maybe(NUMBER),
        disagreement=maybe(NUMBER),
        finish_reason=maybe(TEXT),
        failure=maybe(TEXT),
        tokens=WHOLE,
        logprob=maybe(NUMBER),
        selected=FLAG,
    ),
)
GENERATION: Final = Named(
    "Generation",
    members(
        {"choices": rows(CANDIDATE)},
        id=TEXT,
        object=kind("bonsai.generation"),
        created=WHOLE,
        route=TEXT,
        completion=TEXT,
        finish_reason=maybe(TEXT),
        reward=maybe(NUMBER),
        arm=TEXT,
        arm_reason=TEXT,
        experiment=maybe(TEXT),
        policy=TEXT,
        candidates=CANDIDATE_COUNTS,
        selection=SELECTION,
        usage=members(prompt_tokens=WHOLE, completion_tokens=WHOLE, discarded_tokens=WHOLE, total_tokens=WHOLE),
        warnings=rows(TEXT),
    ),
)
BONSAI: Final = Named(
    "Bonsai",
    members(
        route=TEXT,
        experiment=maybe(TEXT),
        arm=TEXT,
        arm_reason=TEXT,
        policy=TEXT,
        candidates=CANDIDATE_COUNTS,
        selection=SELECTION,
        candidate_tokens=WHOLE,
        log_id=TEXT,
        warnings=rows(TEXT),
    ),
)


def _openai(object_name: str, choice: Mapping[str, Any]) -> Mapping[str, Any]:
    return members(
        id=TEXT,
        object=kind(object_name),
        created=WHOLE,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=rows(choice),
        usage=members(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE),
        bonsai=BONSAI,
    )


COMPLETION: Final = Named(
    "Completion",
    _openai(
        "text_completion",
        members(
            index=WHOLE,
            text=TEXT,
            finish_reason=maybe(TEXT),
            logprobs=maybe(
                members(
                    tokens=rows(TEXT),
                    token_logprobs=rows(NUMBER),
                    top_logprobs=maybe(rows({"type": "object", "additionalProperties": NUMBER})),
                    text_offset={"type": "null"},
                )
            ),
        ),
    ),
)
TOKEN: Final = {"token": TEXT, "logprob": NUMBER, "bytes": rows(WHOLE)}
CALL: Final = members(id=TEXT, type=kind("function"), function=members(name=TEXT, arguments=TEXT))
CHAT_COMPLETION: Final = Named(
    "ChatCompletion",
    _openai(
        "chat.completion",
        members(
            index=WHOLE,
            message=members(
                {"tool_calls": rows(CALL)}, role=kind("assistant"), content=maybe(TEXT), refusal={"type": "null"}
            ),
            logprobs=maybe(
                members(content=rows(members(**TOKEN, top_logprobs=rows(members(**TOKEN)))), refusal={"type": "null"})
            ),
            finish_reason=maybe(TEXT),
        ),
    ),
)
MODEL: Final = Named("Model", members(id=TEXT, object=kind("model"), created=WHOLE, owned_by=TEXT))
FEEDBACK: Final = Named(
    "Feedback",
    Shown(
        Feedback,
        ("kind", "schema_version", "tenant", "group_id"),
        {"object": kind("bonsai.feedback"), "response": maybe(TEXT), "arm": maybe(TEXT)},
    ),
)

# --- the control plane -----------------------------------------------------------------------------------

ROUTE: Final = Named(
    "Route",
    Shown(
        Route,
        ("tenant",),
        {"id": TEXT, "object": kind("bonsai.route"), "live_is_served": maybe(FLAG), "experiment": maybe(TEXT)},
    ),
)
CURVE: Final = Named(
    "Curve",
    members(
        object=kind("bonsai.curve"),
        route=TEXT,
        policy=TEXT,
        reward_model=TEXT,
        n=WHOLE,
        groups=WHOLE,
        prompts=WHOLE,
        skipped=COUNTS,
        points=rows(members(k=WHOLE, reward=Interval, candidate_tokens=NUMBER)),
        within=members(loss=NUMBER, k=WHOLE, k_at_95=WHOLE),
    ),
)
STRATEGY: Final = Named(
    "Strategy",
    members(
        object=kind("bonsai.strategy"),
        route=TEXT,
        strategy=one_of(Strategy),
        groups=WHOLE,
        groups_needed=WHOLE,
        probes=WHOLE,
        probes_needed=WHOLE,
        adaptive=maybe(members(n=WHOLE, stops=rows(WHOLE), reward_per_token=NUMBER, token_share=NUMBER)),
        distilled_first=maybe(members(threshold=maybe(NUMBER), escalated_share=NUMBER)),
    ),
)
ARM_FIGURES: Final[Mapping[str, Schema]] = {
    "exposures": WHOLE,
    "answers": WHOLE,
    "scored": WHOLE,
    "reward": maybe(Interval),
    "completion_tokens_per_answer": maybe(NUMBER),
    "candidate_tokens_per_answer": maybe(NUMBER),
    "engine_seconds_per_answer": maybe(NUMBER),
}
"""What an arm has shown, of an experiment or on trial."""
EXPERIMENT: Final = Named(
    "Experiment",
    members(
        id=TEXT,
        object=kind("bonsai.experiment"),
        route=TEXT,
        status={"enum": ["running", "stopped"]},
        salt_digest=TEXT,
        created_at=NUMBER,
        stopped_at=maybe(NUMBER),
        arms=rows(members(arm=TEXT, policy=TEXT, n=WHOLE, weight=WHOLE, forced=WHOLE, **ARM_FIGURES)),
    ),
)
ENGINE: Final = Named(
    "Engine",
    members(
        id=TEXT,
        object=kind("engine"),
        state=TEXT,
        since=NUMBER,
        reason=maybe(TEXT),
        outstanding_tokens=WHOLE,
        policies=rows(TEXT),
        slots=WHOLE,
        started_at=maybe(NUMBER),
        adapters=rows(
            members(
                policy=TEXT,
                wanted=FLAG,
                resident=FLAG,
                served=FLAG,
                draining=FLAG,
                in_flight=WHOLE,
                proven_at=maybe(NUMBER),
                probed_at=maybe(NUMBER),
                used_at=maybe(NUMBER),
                failures=WHOLE,
                reason=maybe(TEXT),
            )
        ),
    ),
)
_KEY: Final[Mapping[str, Schema]] = {
    "object": kind("bonsai.key"),
    "prefix": TEXT,
    "status": {"enum": ["active", "expired", "revoked"]},
    "last_used_at": maybe(WHOLE),
}
KEY: Final = Named("Key", Shown(KeyRecord, ("digest",), _KEY))
NEW_KEY: Final = Named("NewKey", Shown(KeyRecord, ("digest",), {**_KEY, "key": TEXT}))

# --- the gateway itself ----------------------------------------------------------------------------------

HEALTH: Final = members(status=kind("ok"))
READY: Final = members(
    {
        "engine": TEXT,
        "engines": members(in_rotation=WHOLE, of=WHOLE),
        "reward_model": TEXT,
        "reward_test": TEXT,
        "redis": TEXT,
        "routes": WHOLE,
        "spool": members(has_room=FLAG, pending_bytes=WHOLE, dropped=WHOLE, damaged=WHOLE, refusals=WHOLE),
        "measurements_waiting": WHOLE,
        "limits": {"type": "object"},
    },
    status={"enum": ["ready", "degraded", "starting"]},
)
VERSION: Final = members(
    {"settings_digest": TEXT, "base_policy": TEXT, "reward_model": TEXT}, version=TEXT, schema_version=WHOLE
)
DOCUMENT: Final = members(openapi=TEXT, info={"type": "object"}, paths={"type": "object"})
