"""The whole circle on real parts, in the order in which a user would go round it.

best of n → ledger → distillation → policy → proof → experiment → promotion → one sample. One story: each test goes on
where the one before it stopped, on the session's stack.
"""

from __future__ import annotations

import zlib
from itertools import pairwise

import pytest

from bon_algos.contracts import Outcome
from bonsai.demo.grammar import gold_reward
from bonsai.demo.prompts import training_prompts
from tests.fixtures.real_stack import RealStack, metrics_of, wait_until

pytestmark = pytest.mark.stack
N = 16
PROMPTS = 48


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return list(training_prompts()[:PROMPTS])


@pytest.fixture(scope="module")
def replies(stack: RealStack, prompts: list[str]):
    return stack.fill_ledger(prompts, N)


@pytest.fixture(scope="module")
def job(stack: RealStack, replies):
    """A short distillation from what was just logged: long enough to move the policy, not to finish the work."""
    method = {"type": "bon_forward_kl", "bon_forward_kl": {"n": N, "steps": 30, "prompts_per_step": 8}}
    return stack.finished(stack.start_job(method, n=N, held_out_fraction=0.2))


@pytest.fixture(scope="module")
def policy(stack: RealStack, job):
    assert job["status"] == "succeeded", job["error"]
    return stack.served(job["fine_tuned_model"])


def test_the_reply_is_the_best_of_what_was_drawn(stack, prompts):
    reply = stack.generate(prompts[0], n=N, return_candidates=True)
    rewards = [choice["reward"] for choice in reply["choices"]]
    best = max(rewards)

    assert reply["completion"] == reply["choices"][rewards.index(best)]["text"]
    assert reply["reward"] == reply["selection"]["reward"] == best
    assert reply["candidates"] == {"requested": N, "finished": N, "scored": N, "failed": {}}
    assert (reply["selection"]["status"], reply["arm"]) == ("ok", f"{stack.base_policy}:{N}")
    second = sorted(rewards)[-2]
    assert reply["selection"]["margin"] == pytest.approx(best - second)
    drawn = sum(choice["tokens"] for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] + reply["usage"]["discarded_tokens"] == drawn


def test_the_reward_model_has_proved_itself_on_known_pairs(stack):
    assert stack.http.get("/ready").json()["reward_test"] == "passed"


def test_one_sample_is_not_delayed_by_its_score_which_the_ledger_has_later(stack, prompts):
    reply = stack.generate(prompts[1], n=1)
    assert (reply["reward"], reply["selection"]["status"]) == (None, "single")

    def outcomes():
        return [r for r in stack.ledger() if isinstance(r, Outcome) and r.group_id == reply["id"]]

    [measured] = wait_until(outcomes, "the sample's reward is in the ledger")
    again = stack.generate(prompts[1], n=1, wait_for_reward=True)
    assert len(measured.rewards) == 1
    assert again["reward"] is not None


def test_the_ledger_holds_what_was_served_token_for_token(stack, replies):
    groups = {group.id: group for group in stack.groups()}
    for reply in replies:
        group = groups[reply["id"]]
        assert group.is_unbiased
        assert group.candidates[group.selected].text == reply["completion"]
        assert group.candidates[group.selected].reward == reply["reward"]
        assert all(len(c.token_ids) == len(c.logprobs) > 0 for c in group.candidates)


def test_best_of_n_beats_one_sample_by_gold_as_well(stack, prompts, replies):
    groups = {group.id: group for group in stack.groups()}
    best, single = [], []
    for prompt, reply in zip(prompts, replies, strict=True):
        first = groups[reply["id"]].candidates[0].text
        best.append(gold_reward(prompt, reply["completion"]))
        single.append(gold_reward(prompt, first))
    assert sum(best) / len(best) > sum(single) / len(single)


def test_the_job_reports_on_held_out_prompts_and_what_it_learned_from(job):
    assert job["status"] == "succeeded", job["error"]
    details = job["bonsai"]
    assert (details["phase"], details["step"], details["steps"]) == ("done", 30, 30)
    report = details["report"]
    assert report["prompts"] >= 2
    assert report["n"] == N
    assert report["reward_gain"]["low"] <= report["reward_gain"]["mean"] <= report["reward_gain"]["high"]
    assert 0 < report["kl_policy_reference"]["mean"] < 5
    assert 0 <= report["win_rate"]["mean"] <= 1
    assert metrics_of(job)


def test_the_engine_proves_that_it_serves_the_policy_and_not_the_base(policy):
    fingerprint = policy["fingerprint"]
    assert fingerprint["passed"], fingerprint
    assert fingerprint["tokens"] >= 256
    assert fingerprint["mean_abs_difference"] <= 1e-3
    assert fingerprint["mean_abs_difference"] <= fingerprint["mean_abs_base_distance"] / 10
    assert policy["state"] == "candidate"
    assert policy["manifest"]["report"]["n"] == N


def test_a_forced_arm_is_recorded_as_forced(stack, prompts, policy):
    forced = {"x-bonsai-arm": f"{policy['id']}:1"}
    reply = stack.generate(prompts[2], headers=forced)
    assert (reply["arm"], reply["arm_reason"], reply["policy"]) == (f"{policy['id']}:1", "forced", policy["id"])
    [group] = wait_until(lambda: [g for g in stack.groups() if g.id == reply["id"]], "it is logged")
    assert (group.arm_reason, group.policy_id) == ("forced", policy["id"])


def test_an_experiment_sticks_to_its_units_and_counts_each_exposure(stack, prompts, policy):
    arms = [{"policy": "base", "n": N, "weight": 5000}, {"policy": policy["id"], "n": 1, "weight": 5000}]
    assert stack.http.put("/experiments/default", json={"arms": arms}).status_code == 200
    units = [f"person-{number}" for number in range(12)]
    first = {unit: stack.generate(prompts[3], unit=unit)["arm"] for unit in units}
    second = {unit: stack.generate(prompts[4], unit=unit)["arm"] for unit in units}
    assert first == second
    assert set(first.values()) == {f"{stack.base_policy}:{N}", f"{policy['id']}:1"}

    def counted():
        seen = stack.http.get("/experiments/default").json()["arms"]
        is_all = sum(arm["exposures"] for arm in seen) == 24 and all(arm["reward"] for arm in seen)
        return seen if is_all else None

    by_arm = {arm["arm"]: arm for arm in wait_until(counted, "24 exposures, and rewards of both arms")}
    assert {name: arm["exposures"] for name, arm in by_arm.items()} == {
        name: 2 * list(first.values()).count(name) for name in by_arm
    }
    best_of_n, single = by_arm[f"{stack.base_policy}:{N}"], by_arm[f"{policy['id']}:1"]
    assert best_of_n["candidate_tokens_per_answer"] > 8 * single["candidate_tokens_per_answer"]
    assert stack.http.delete("/experiments/default").status_code in (200, 204)


def test_promotion_needs_a_reason_moves_traffic_and_is_taken_back_by_one_call(stack, prompts, policy):
    refused = stack.http.post(f"/policies/{policy['id']}/promote", json={"route": "default"})
    assert refused.status_code in (409, 422)
    reason = {"route": "default", "override_reason": "the circle's test"}
    assert stack.http.post(f"/policies/{policy['id']}/promote", json=reason).status_code == 200
    answers = [stack.generate(prompts[5], n=N) for _ in range(4)]
    stands_in = next(one for one in answers if one["selection"]["stop_reason"] != "holdout")
    assert (stands_in["arm"], stands_in["arm_reason"]) == (f"{policy['id']}:1", "live")
    larger = stack.generate(prompts[5], n=N + 1)
    assert (larger["arm"], larger["arm_reason"]) == (f"{stack.base_policy}:{N + 1}", "n_above_equivalent")

    assert stack.http.post("/routes/default/rollback").status_code == 200
    assert stack.generate(prompts[5], n=N)["arm"] == f"{stack.base_policy}:{N}"
    assert stack.http.post("/routes/default/rollback").status_code == 409


def test_fresh_samples_from_the_engine_teach_j_bond(stack, replies):
    """Two anchor samples and one of the policy for each prompt, from versioned adapters that are gone afterwards."""
    method = {"type": "jbond", "jbond": {"steps": 6, "prompts_per_step": 8, "lora_rank": 8, "lora_alpha": 16}}
    job = stack.finished(stack.start_job(method, n=2))
    assert job["status"] == "succeeded", job["error"]
    assert stack.served(job["fine_tuned_model"])["fingerprint"]["passed"]


def test_every_reward_a_user_saw_is_on_the_record_once(stack):
    ids = [record.id for record in stack.ledger()]
    assert len(ids) == len(set(ids))
    times = [group.created_at for group in stack.groups()]
    assert all(later > earlier - 60 for earlier, later in pairwise(times))
    assert all(zlib.decompress(entry[1][b"data"]) for entry in stack.redis.xrange("bonsai:ledger", count=5))
