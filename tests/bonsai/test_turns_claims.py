"""The benchmark of the circle claims all turns that were asked for, and tells of those that there were."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks import claims, turns
from bon_algos.contracts import Turn
from bonsai.client import CircleSpent, RunningCircle
from bonsai.demo import measure
from tests.service.records import BASE, numbered

RNG = np.random.default_rng(0)
REWARD_BM = RNG.normal(size=(40, 32))


def worth(policy: str, better: float) -> turns.Worth:
    """Of a policy whose rewards are the base's and a constant."""
    prompts = tuple(f"prompt {row}" for row in range(40))
    reward_BM, is_complete_BM = REWARD_BM + better, np.ones(REWARD_BM.shape, dtype=bool)
    pool = measure.Pool(prompts, reward_BM, reward_BM, is_complete_BM, np.full(REWARD_BM.shape, 9.0))
    return turns.Worth(policy, pool, measure.quality_of_one(pool, None, None))


def circle(promoted: int, under_way: bool) -> RunningCircle:
    ended = tuple(
        Turn(number=i, began_at=0.0, parent=BASE, policy=numbered(i), phase="over", ended_at=9.0, outcome="promoted")
        for i in range(1, promoted + 1)
    )
    turn = Turn(number=promoted + 1, began_at=9.0, parent=BASE) if under_way else None
    return RunningCircle(
        route="default",
        status="running" if under_way else "stopped",
        reason="",
        live_policy=None,
        turn=turn,
        turns=ended,
        spent=CircleSpent(jobs=promoted, gpu_seconds=1.0, kl_base=1.0, kl_base_foreseen=2.0),
    )


def worths(promoted: int) -> list[turns.Worth]:
    return [worth("base", 0.0), *(worth(numbered(i), float(i)) for i in range(1, promoted + 1))]


@pytest.mark.parametrize(("promoted", "holds"), [(3, True), (2, False), (0, False)])
def test_only_all_turns_are_enough(promoted: int, holds: bool):
    found = turns.claims_of(circle(promoted, under_way=False), worths(promoted), 3)
    assert all(claim.holds for claim in found) is holds
    assert {claim.name: claim.holds for claim in found}["turns that were promoted"] is holds


def test_the_table_has_what_turns_aim_at_as_far_as_the_draws_of_the_base_tell_of_it():
    rows = turns.rows_of(worths(3), circle(3, under_way=False).turns, 3)
    assert [row[0] for row in rows if row[0].startswith("(best of")] == [
        "(best of 3 of the base)",
        "(best of 9 of the base)",  # 27 of 32 leave too few to win against
    ]


def test_after_the_deadline_the_table_and_the_claims_are_of_what_there_was(tmp_path):
    for promoted in (0, 1):
        ended, measured = circle(promoted, under_way=True), worths(promoted)
        rows = turns.rows_of(measured, turns.turns_of(ended), 3)
        aims = [f"(best of {3**i} of the base)" for i in range(1, promoted + 2)]
        assert [row[0] for row in rows] == [
            "the base",
            *aims,
            *(["turn 1, promoted"] * promoted),
            f"turn {promoted + 1}, training",
        ]
        claimed = turns.claims_of(ended, measured, 3)
        assert claims.finish(claimed, tmp_path / "told.json", turns.figures_of(ended, measured)) == 1
        told = json.loads((tmp_path / "told.json").read_text())
        assert len(told["figures"]["turns"]) == promoted + 1
    assert math.isnan(turns.claims_of(circle(0, under_way=True), worths(0), 3)[4].value)
