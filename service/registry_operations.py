"""What the registry's operations accept and answer: their rows of the OpenAPI document.

Owns: the rows of `/policies`, `/tags`, `/audit` and a route's trials. Does not own: the rows' form and all others
(operations.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from bon_algos.contracts import PolicyState
from service import registry_replies as replies
from service.errors import (
    Conflict,
    InvalidField,
    PolicyNotFound,
    PreconditionFailed,
    RouteNotFound,
    StoreFull,
    TagNotFound,
)
from service.lineage import FORMS, MEDIA_TYPES
from service.operation import LIMIT, MATCH, ONCE, PAGE, Body, Operation, Parameter, query
from service.policies import PolicyChange
from service.registration import RegistrationRequest
from service.replies import ROUTE, listed
from service.routes.policies import BASE_PATTERN, PromoteRequest, WithdrawRequest
from service.tags import TagRequest

CHANGING: Final = (PolicyNotFound, Conflict, PreconditionFailed, StoreFull)
FILTERS: Final[tuple[Parameter, ...]] = (
    query("after", "The id of a row: those behind it follow.", type="string", minLength=1),
    query("state", "In this state alone.", enum=[*get_args(PolicyState)]),
    query("tag", "What this tag names.", type="string"),
    query("route", "What is, was or would be anything to this route.", type="string"),
    query("parent", "What was made from this policy.", type="string"),
)

REGISTRY_OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("GET", "/policies"): Operation(
        "All policies",
        {200: listed(replies.POLICY)},
        parameters=(LIMIT, *FILTERS),
        errors=(InvalidField, RouteNotFound),
    ),
    ("POST", "/policies"): Operation(
        "Register an imported policy",
        {201: replies.POLICY},
        Body(RegistrationRequest, {"digest": "0" * 64}),
        (ONCE,),
        errors=(Conflict, StoreFull),
        headers=("Location", "ETag"),
    ),
    ("GET", "/policies/{policy_id}"): Operation(
        "A policy", {200: replies.POLICY}, errors=(PolicyNotFound,), headers=("ETag",)
    ),
    ("PATCH", "/policies/{policy_id}"): Operation(
        "Describe or protect a policy",
        {200: replies.POLICY},
        Body(PolicyChange, {"description": "Reviewed by the film team.", "is_protected": True}),
        (MATCH,),
        (PolicyNotFound, PreconditionFailed, StoreFull),
        headers=("ETag",),
    ),
    ("DELETE", "/policies/{policy_id}"): Operation(
        "Delete a policy for good", {204: None}, parameters=(MATCH,), errors=CHANGING
    ),
    ("POST", "/policies/{policy_id}/promote"): Operation(
        "Make a policy shadow, canary or live on a route",
        {200: ROUTE},
        Body(PromoteRequest, {"route": "default", "override_reason": "The report was read."}),
        (ONCE, MATCH),
        (RouteNotFound, *CHANGING),
    ),
    ("POST", "/policies/{policy_id}/withdraw"): Operation(
        "End a policy's shadow or canary",
        {200: ROUTE},
        Body(WithdrawRequest, {"route": "default"}),
        (ONCE, MATCH),
        (RouteNotFound, *CHANGING),
    ),
    ("POST", "/policies/{policy_id}/retire"): Operation(
        "Take a candidate out of use",
        {200: replies.POLICY},
        parameters=(ONCE, MATCH),
        errors=(*CHANGING, InvalidField),
        headers=("ETag",),
    ),
    ("GET", "/policies/{policy_id}/lineage"): Operation(
        "What a policy was made from, and what from it",
        {200: replies.LINEAGE},
        parameters=(query("format", "As what.", enum=[*FORMS], default="json"),),
        errors=(PolicyNotFound, InvalidField),
        also=(MEDIA_TYPES["mermaid"], MEDIA_TYPES["dot"]),
    ),
    ("GET", "/policies/{policy_id}/export"): Operation(
        "A policy's files, in a tar archive",
        {200: None},
        parameters=(query("base", "What an adapter says of its base.", type="string", pattern=BASE_PATTERN),),
        errors=(PolicyNotFound, Conflict, InvalidField),
        headers=("ETag",),
        also=("application/x-tar",),
    ),
    ("GET", "/routes/{route}/trials"): Operation(
        "What a route's shadow and canary have shown", {200: replies.TRIALS}, errors=(RouteNotFound,)
    ),
    ("GET", "/tags"): Operation("All tags", {200: listed(replies.TAG)}, parameters=PAGE, errors=(InvalidField,)),
    ("GET", "/tags/{tag}"): Operation("A tag", {200: replies.TAG}, errors=(TagNotFound,), headers=("ETag",)),
    ("PUT", "/tags/{tag}"): Operation(
        "Have a tag name a policy",
        {200: replies.TAG, 201: replies.TAG},
        Body(TagRequest, {"policy": "pol-" + "0" * 16}),
        (MATCH,),
        CHANGING,
        headers=("ETag",),
    ),
    ("DELETE", "/tags/{tag}"): Operation(
        "Remove a tag", {204: None}, parameters=(MATCH,), errors=(TagNotFound, PreconditionFailed, StoreFull)
    ),
    ("GET", "/audit"): Operation(
        "Who did what", {200: listed(replies.AUDIT_ENTRY)}, parameters=PAGE, errors=(InvalidField,)
    ),
}
