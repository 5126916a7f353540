"""What a route's n-curve says of the groups that came since a circle's last turn.

Owns: when it is drawn anew. Does not own: the curve (curve.py), whether anybody needs it (circle_rules.py).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bon_algos.contracts import Circle, Route
from service.circle_rules import FreshGroups
from service.curve import Curves
from service.errors import Conflict

GROWTH: Final = 0.1
"""By which share the fresh groups must have grown since the last curve: to draw one reads thousands of groups, and a
circle looks every few seconds."""


class _Question(NamedTuple):
    """What the answer depends on, beside how many groups there are."""

    since: float
    counted: int
    live_policy: str | None
    min_groups: int


class _Answer(NamedTuple):
    question: _Question
    groups: int
    """Fresh ones, as the route counted them."""
    found: FreshGroups | None


class FreshCurves:
    """The latest curve of each circle."""

    def __init__(self, curves: Curves) -> None:
        self._curves = curves
        self._kept: dict[tuple[str, str], _Answer] = {}

    async def of(self, circle: Circle, route: Route, counted: int) -> FreshGroups | None:
        """counted: the route's groups now. None where they are too few for a curve. Raises StoreUnavailable."""
        name, groups = (circle.tenant, circle.route), counted - circle.counted
        question = _Question(circle.since, circle.counted, route.live_policy, circle.spec.min_groups)
        kept = self._kept.get(name)
        if kept is None or kept.question != question or not kept.groups <= groups < (1 + GROWTH) * kept.groups:
            kept = self._kept[name] = _Answer(question, groups, await self._drawn(circle, route))
        return kept.found

    async def _drawn(self, circle: Circle, route: Route) -> FreshGroups | None:
        try:
            curve = await self._curves.of(route, num_groups=circle.spec.min_groups, n=None, since=circle.since)
        except Conflict:
            return None
        return FreshGroups(curve.groups, curve.missing[0])
