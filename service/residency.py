"""Which adapters one engine should hold and what is to be done next about it: pure, no I/O, no clock.

Owns: the choice of what comes, stays and leaves, its order, what may be served meanwhile. Does not own: finding out
what an engine holds and carrying the plan out (publishing.py), what is wanted of it (`wanted_policies` there).

    load      wanted, not there, and there is a slot for it
    prove     there, and its proof is missing or old
    drain     it must leave: no new request; those under way go on
    unload    drained, and nobody waits for it any more, or for too long
    keep      drained, and wanted again

Every gateway plans for itself from what it sees; all come to the same, because they want the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

DRAIN_SECONDS: Final = 120.0
"""Requests that an adapter was drawn from may go on for so long before it is taken from under them."""
LIFETIMES: Final = 3.0
"""A proof counts for so many times the pause between two: an engine too busy to prove anew is not a liar yet."""

Deed = Literal["drain", "unload", "keep", "load", "prove"]


class Action(NamedTuple):
    deed: Deed
    policy: str


@dataclass(frozen=True)
class Holding:
    """One policy on one engine. Times are of one clock that never goes back; seconds."""

    policy: str
    is_loaded: bool = False
    is_barred: bool = False
    """It must not be there: it failed or is tainted, or this engine had other weights under its name."""
    proven_at: float | None = None
    """When it last proved that it has the policy's weights; None: not in this life of the engine."""
    retry_at: float = 0.0
    """Neither loaded nor proved before, because that has just failed."""
    in_flight: int = 0
    last_used_at: float = 0.0
    leaves_at: float | None = None
    """Drained: it is unloaded then, whoever waits. None: it is not drained."""


def servable(held: Iterable[Holding], prove_every: float, now: float) -> frozenset[str]:
    """Policies that requests may be sent to."""
    return frozenset(
        one.policy
        for one in held
        if one.is_loaded
        and not one.is_barred
        and one.leaves_at is None
        and one.proven_at is not None
        and now - one.proven_at < LIFETIMES * prove_every
    )


def chosen(wanted: Sequence[str], held: Mapping[str, Holding], slots: int) -> list[str]:
    """What this engine is to hold, most needed first: of what is wanted as much as it has slots for."""
    return [policy for policy in wanted if policy not in held or not held[policy].is_barred][:slots]


def plan(
    wanted: Sequence[str], held: Mapping[str, Holding], *, slots: int, prove_every: float, now: float
) -> list[Action]:
    """What to do next, in this order. wanted: without repeats, most needed first. held: all that is loaded, and what
    is known of others. Nothing is left to do when it is empty; what waits for a time or a request is not in it.

    What nothing points at stays while there is room, and answers: it may be wanted again. For want of room the one
    that was used least recently leaves, never one in `chosen`.
    """
    keep = chosen(wanted, held, slots)
    loaded = {name: one for name, one in held.items() if one.is_loaded}
    missing = [name for name in keep if name not in loaded and (name not in held or held[name].retry_at <= now)]
    leaving = _leaving(keep, loaded, len(loaded) + len(missing) - slots)
    coming = missing[: max(0, slots - len(loaded))]
    staying = [name for name in (*keep, *sorted(loaded.keys() - set(keep))) if name in loaded and name not in leaving]
    return [
        *(Action("drain", name) for name in leaving if loaded[name].leaves_at is None),
        *(Action("unload", name) for name in leaving if _nobody_waits(loaded[name], now)),
        *(Action("keep", name) for name in staying if loaded[name].leaves_at is not None),
        *(action for name in coming for action in (Action("load", name), Action("prove", name))),
        *(Action("prove", name) for name in staying if _is_due(loaded[name], prove_every, now)),
    ]


def _leaving(keep: Sequence[str], loaded: Mapping[str, Holding], too_many: int) -> list[str]:
    """What is barred, and of the rest that nothing points at as many as are too many; those drained already first."""
    barred = sorted(name for name, one in loaded.items() if one.is_barred)
    spare = [one for name, one in loaded.items() if name not in keep and not one.is_barred]
    spare.sort(key=lambda one: (one.leaves_at is None, one.in_flight > 0, one.last_used_at, one.policy))
    return [*barred, *(one.policy for one in spare[: max(0, too_many - len(barred))])]


def _nobody_waits(one: Holding, now: float) -> bool:
    return one.in_flight == 0 or (one.leaves_at is not None and now >= one.leaves_at)


def _is_due(one: Holding, prove_every: float, now: float) -> bool:
    return one.retry_at <= now and (one.proven_at is None or now - one.proven_at >= prove_every)
