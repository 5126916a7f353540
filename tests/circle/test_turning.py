"""One turn of a circle with nobody at it, on the session's stack: between its rules and a live policy, only traffic.

Short: few groups, few steps, few answers. What turns are worth is `benchmarks.turns`; each step, and what breaks in it,
is tests/service/test_circles.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest

from bonsai.demo.prompts import training_prompts
from tests.fixtures.real_stack import RealStack, wait_until

pytestmark = pytest.mark.stack
ROUTE, N, PROMPTS = "turning", 8, 48
CIRCLE = f"/routes/{ROUTE}/circle"
METHOD = {"n": N, "steps": 40, "warmup_steps": 4, "averaged_steps": 10, "prompts_per_step": 8, "learning_rate": 3e-3}
SPEC = {
    "method": {"type": "offline_bond", "offline_bond": METHOD},
    "n": N,
    "min_groups": PROMPTS,
    "held_out_fraction": 0.25,
    "gate": {"judge_margin": 10.0},
    "shadow": {"share": 1.0, "answers": 5},
    "canary": {"share": 0.5, "answers": 5},
    "max_turns": 1,
}
PROMPTS_OF_IT = list(training_prompts()[:PROMPTS])


@pytest.fixture(scope="module")
def ended(stack: RealStack) -> Iterator[dict[str, Any]]:
    """The circle when its one turn is over. Undone afterwards: an engine has few places, and other tests' policies need
    one."""
    assert stack.http.put(f"/routes/{ROUTE}", json={"default_n": N}).status_code == 201
    assert stack.http.put(CIRCLE, json=SPEC).status_code == 201
    stack.fill_ledger(PROMPTS_OF_IT, N, route=ROUTE)
    prompts = cycle(PROMPTS_OF_IT)

    def look() -> dict[str, Any] | None:
        seen = dict(stack.http.get(CIRCLE).json())
        if seen["turn"] is not None and seen["turn"]["phase"] in ("shadow", "canary"):
            stack.generate(next(prompts), n=N, route=ROUTE)
        return seen if seen["status"] == "stopped" else None

    over = wait_until(look, "the turn is over", seconds=240)
    assert over is not None
    yield over
    assert stack.http.post(f"/routes/{ROUTE}/rollback", json={"reason": "the tests are over"}).status_code == 200
    assert stack.http.delete(CIRCLE).status_code == 204
    assert stack.http.delete(f"/routes/{ROUTE}").status_code == 204


def test_it_was_promoted_through_every_gate(ended):
    [turn] = ended["turns"]
    assert (turn["outcome"], turn["phase"]) == ("promoted", "over"), turn
    assert turn["reward_gain"]["low"] > 0
    assert turn["judge_gain"] is not None
    assert turn["seconds"] > 0
    assert (ended["reason"], ended["live_policy"]) == ("all 1 turns are done", turn["policy"])


def test_what_it_made_answers_with_one_sample_for_best_of_n(stack, ended):
    policy = ended["live_policy"]
    assert stack.http.get(f"/routes/{ROUTE}").json()["live_policy"] == policy
    # Some are answered by best-of-n all the same: the next turn would learn from them.
    arms = {stack.generate(prompt, n=N, route=ROUTE)["arm"] for prompt in PROMPTS_OF_IT[:12]}
    assert f"{policy}:1" in arms
    assert arms <= {f"{policy}:1", f"{policy}:{N}"}


def test_nobody_else_did_any_of_it(stack, ended):
    entries = stack.http.get("/audit?limit=100").json()["data"]
    moved = [entry for entry in entries if ended["live_policy"] in str(entry)]
    assert {"shadow_start", "canary_start", "promote"} <= {entry["event"] for entry in moved}
    assert {entry["by"] for entry in moved} <= {f"circle:{ROUTE}", "gateway", "worker"}
