"""How long what is kept, by class of content, and what goes today.

Owns: the classes and their times, which segments are due, what becomes of their rows. Does not own: which groups have
feedback or are pinned (the caller says), the stream, when this runs.

    text        prompts, messages, completions, comments, corrections
    tokens      token ids and their log-probs
    scores      the rows: rewards, counts, times, ids, feedback
    aggregates  what the manifest tells of a segment whose rows are gone

A time counts from the youngest record of a segment, so that a segment goes as a whole. A row that is kept because of
feedback or a dataset is kept for good, with all its content. What a class lost does not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from archive.fence import ALONE, Fence
from archive.manifest import Batch, Segment
from archive.reading import Archive
from archive.tables import without_text, without_tokens
from archive.writing import forget_totals, rewrite
from bon_algos.contracts import Record, of_tenant

DAY_SECONDS: Final = 86_400.0
Class = Literal["text", "tokens", "scores", "aggregates"]
CLASSES: Final[tuple[Class, ...]] = ("text", "tokens", "scores", "aggregates")
Keep = Literal["feedback", "pinned"]
Days = Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)]


class Ages(Record):
    """Days that each class is kept; null: for good."""

    text: Days | None = None
    tokens: Days | None = None
    scores: Days | None = None
    aggregates: Days | None = None

    @model_validator(mode="after")
    def _rows_outlive_their_content(self) -> Self:
        order = [self.scores, self.aggregates]
        for inner in (self.text, self.tokens):
            if self.scores is not None and (inner is None or inner > self.scores):
                raise ValueError("text and tokens go with the scores at the latest: give them at most as many days")
        if order[1] is not None and (order[0] is None or order[0] > order[1]):
            raise ValueError("aggregates are what is left of scores: give scores at most as many days")
        return self

    @property
    def shortest_seconds(self) -> float | None:
        """After which nothing may stand in the stream as it was said."""
        given = [days for days in (self.text, self.tokens, self.scores) if days is not None]
        return min(given) * DAY_SECONDS if given else None


class Retention(Ages):
    """Of the ledger, with exceptions by route."""

    keep: tuple[Keep, ...] = ("feedback", "pinned")
    """Rows that are kept whatever their age: with feedback, or in the window of a job."""
    routes: dict[str, Ages] = Field(default_factory=dict)
    """By route, `tenant/route` outside the tenant `default`; instead of the above."""

    def ages_of(self, segment: Segment) -> Ages:
        named = None if segment.route is None else self.routes.get(of_tenant(segment.tenant, segment.route))
        return named or self

    @property
    def shortest_of_all(self) -> float | None:
        given = [one.shortest_seconds for one in (self, *self.routes.values())]
        found = [seconds for seconds in given if seconds is not None]
        return min(found) if found else None


class Due(NamedTuple):
    """What happens to a segment."""

    batch: Batch
    segment: Segment
    classes: tuple[Class, ...]


Kept = Callable[[Segment, Sequence[Mapping[str, Any]]], Collection[str]]
"""Ids of groups among some rows that have feedback or are pinned."""


def due(archive: Archive, retention: Retention, now: float) -> list[Due]:
    """What goes today, newest batch first. Nothing is changed."""
    found = []
    for batch in archive.manifest.batches_newest_first():
        for segment in batch.segments:
            classes = _due_classes(segment, retention.ages_of(segment), now)
            if classes:
                found.append(Due(batch, segment, classes))
    return found


def _due_classes(segment: Segment, ages: Ages, now: float) -> tuple[Class, ...]:
    old = (now - segment.last_created) / DAY_SECONDS
    over = [name for name in CLASSES if (days := getattr(ages, name)) is not None and old > days]
    return tuple(name for name in over if name not in segment.lacks and _has(segment, name))


def _has(segment: Segment, name: Class) -> bool:
    if name == "aggregates":
        return segment.path is None
    if segment.path is None:
        return False
    if name == "text":
        return segment.kind in ("groups", "feedback")
    return name == "scores" or segment.kind == "groups"


def apply(
    archive: Archive,
    dues: Sequence[Due],
    retention: Retention,
    kept: Kept,
    *,
    forgotten: Callable[[Segment, Sequence[Mapping[str, Any]]], None] = lambda segment, rows: None,
    fence: Fence = ALONE,
) -> list[Due]:
    """Carry it out; what was, which is all but segments that are damaged. forgotten: told the rows that lost something.
    Raises OSError; again is the same."""
    damaged: list[Segment] = []
    for batch in {one.batch.first: one.batch for one in dues}.values():
        classes_of = {one.segment.path: one.classes for one in dues if one.batch.first == batch.first}

        def change(
            segment: Segment, rows: list[dict[str, Any]], classes_of: dict[str | None, tuple[Class, ...]] = classes_of
        ) -> tuple[list[dict[str, Any]], tuple[str, ...]] | None:
            classes = classes_of.get(segment.path, ())
            if not classes:
                return None
            spared = kept(segment, rows)
            changed = [row for row in rows if row.get("group_id", row.get("id")) not in spared]
            forgotten(segment, changed)
            return _after(rows, changed, classes), (*segment.lacks, *classes)

        rewrite(archive, batch, change, fence, damaged.append)
    gone = {one.segment for one in dues if "aggregates" in one.classes}
    for day in {one.batch.day for one in dues if "aggregates" in one.classes}:
        forget_totals(archive, day, gone, fence)
    return [one for one in dues if one.segment not in damaged]


def _after(
    rows: Sequence[dict[str, Any]], changed: Sequence[dict[str, Any]], classes: Sequence[Class]
) -> list[dict[str, Any]]:
    """The rows with the classes taken from those that are to lose them."""
    losing = {id(row) for row in changed}
    left = []
    for row in rows:
        if id(row) not in losing:
            left.append(row)
            continue
        if "scores" in classes:
            continue
        row = without_text(row) if "text" in classes else row
        left.append(without_tokens(row) if "tokens" in classes else row)
    return left
