"""Who asks, and what they may.

Owns: the roles and their rights, what is known of the sender of a request, how a route declares the right it needs.
Does not own: the keys (keys.py), finding out whose key came (authentication.py), what a request may cost.

Nothing is allowed that no line here allows, and an app with a route that declares nothing does not start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from fastapi import FastAPI
from fastapi.params import Depends
from fastapi.routing import APIRoute
from starlette.requests import Request

from bon_algos.contracts import DEFAULT_TENANT, PolicyRecord
from service.errors import Forbidden, GatewayError

Role = Literal["admin", "operator", "trainer", "inference", "viewer"]
Right = Literal[
    "complete", "force_arm", "list_models", "read", "read_content", "train", "move_traffic", "manage_keys", "erase",
    "read_audit", "manage_webhooks",
]  # fmt: skip
ROLES: Final[Mapping[Right, tuple[Role, ...]]] = {
    "complete": ("admin", "operator", "inference"),
    "force_arm": ("admin", "operator"),
    "list_models": ("admin", "operator", "trainer", "inference", "viewer"),
    "read": ("admin", "operator", "trainer", "viewer"),
    "read_content": ("admin", "operator", "trainer"),
    "train": ("admin", "operator", "trainer"),
    "move_traffic": ("admin", "operator"),
    "manage_keys": ("admin",),
    "erase": ("admin",),
    "read_audit": ("admin",),
    "manage_webhooks": ("admin", "operator"),
}
"""Who has a right. complete: ask for completions and give feedback on them. read: routes, policies, jobs, experiments,
their numbers, no texts. read_content: what people wrote. train: submit and cancel jobs. move_traffic: routes,
experiments, promotion, roll-back, what becomes of a policy. erase: have what one user left forgotten. manage_webhooks:
have the gateway tell addresses of one's choice what happens to jobs and policies."""


class Caller(NamedTuple):
    """The sender of one request, by the key it came with."""

    key_id: str
    tenant: str
    role: Role
    routes: tuple[str, ...] | None = None
    """Those of the tenant's routes that the key is good for; None: all."""
    store: bool = True
    """Whether the texts of a request are kept that does not say."""

    def may(self, right: Right) -> bool:
        return self.role in ROLES[right]

    def require(self, right: Right, *, param: str | None = None) -> None:
        """Raises Forbidden, which names who may."""
        if not self.may(right):
            raise Forbidden(
                f"this needs a key with one of the roles {', '.join(ROLES[right])}", param=param, facts={"right": right}
            )

    def may_use(self, route: str) -> bool:
        return self.routes is None or route in self.routes

    def require_route(self, route: str) -> None:
        """Raises Forbidden for a route that the key is not good for, be there one of that name or not."""
        if not self.may_use(route):
            raise Forbidden("this needs a key that is good for this route", param="route", code="route_forbidden")

    def require_policy(self, policy: PolicyRecord, param: str = "policy_id") -> None:
        """Raises Forbidden for a key for some routes, unless the policy learned from those alone: an import and a base
        are of all routes. The policy has been found among the tenant's."""
        if self.routes is not None and not _learned_from(policy):
            raise _of_other_routes(param)
        self.require_servable(policy, param)

    def require_servable(self, policy: PolicyRecord, param: str = "policy_id") -> None:
        """Raises Forbidden for a key for some routes where the policy learned from another: what it says tells what
        that one was asked. An import and a base may answer anywhere."""
        if not all(map(self.may_use, _learned_from(policy))):
            raise _of_other_routes(param)


def _learned_from(policy: PolicyRecord) -> tuple[str, ...]:
    """Routes; none of an import and of a base."""
    spec = None if policy.manifest is None else policy.manifest.spec
    return () if spec is None else (spec.route, *spec.window.routes)


def _of_other_routes(param: str) -> Forbidden:
    said = "this needs a key that is good for the routes that the policy learned from"
    return Forbidden(said, param=param, code="route_forbidden")


GATEWAY: Final = Caller("gateway", DEFAULT_TENANT, "admin")
"""Who does what nobody asked for."""


def caller_of(request: Request) -> Caller:
    """As the edge found out. Raises why it is nobody: Unauthenticated, TooManyWrongKeys, StoreUnavailable."""
    caller: Caller | GatewayError = request.state.caller
    if isinstance(caller, GatewayError):
        raise caller
    return caller


def known_caller(request: Request) -> Caller | None:
    """Of a route that is open to everybody: who asks, if that is known."""
    caller: Caller | GatewayError = request.state.caller
    return caller if isinstance(caller, Caller) else None


@dataclass(frozen=True)
class Needs(Depends):
    """What a route declares. right None: nothing, not even a key."""

    right: Right | None = None


def needs(right: Right) -> Needs:
    """In a route's `dependencies`: only callers with this right get to it."""

    async def check(request: Request) -> None:
        caller_of(request).require(right)

    return Needs(check, right=right)


async def _nothing() -> None:
    """Anybody may ask."""


OPEN_TO_ALL: Final = Needs(_nothing)


def rights(app: FastAPI) -> dict[tuple[str, str], Right | None]:
    """(method, path) -> the right it needs, of every route. Raises ValueError for a route that declares none or two."""
    found: dict[tuple[str, str], Right | None] = {}
    for route in app.routes:
        declared = [one for one in route.dependencies if isinstance(one, Needs)] if isinstance(route, APIRoute) else []
        path = getattr(route, "path", "?")
        if len(declared) != 1:
            raise ValueError(f"the route {path} declares {len(declared)} rights instead of one")
        assert isinstance(route, APIRoute)
        found |= {(method, path): declared[0].right for method in route.methods}
    return found
