"""What a record means: which candidate is best, which groups may teach, what a spec refuses."""

import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from bon_algos.contracts import (
    LEDGER_RECORD,
    Arm,
    BonForwardKlSpec,
    Candidate,
    CandidateGroup,
    CircleSpec,
    JBondSpec,
    JobSpec,
    Method,
    OfflineBondSpec,
    Sampling,
)

POLICY = "pol-0123456789abcdef"


def candidate(
    reward: float | None, *, text: str = "good", finish: str | None = "stop", policy: str | None = None
) -> Candidate:
    drawn = {"text": text, "token_ids": [5, 2], "logprobs": [-0.5, -0.1], "finish_reason": finish}
    return Candidate.model_validate({**drawn, "reward": reward, "policy_id": policy})


def group(*candidates: Candidate, requested: int | None = None, **changes: object) -> CandidateGroup:
    return CandidateGroup.model_validate(
        {
            "id": "resp_1",
            "created_at": 1.0,
            "route": "default",
            "arm": Arm(policy=POLICY, n=requested or len(candidates)),
            "arm_reason": "default",
            "policy_id": POLICY,
            "reward_model_id": "rm-1",
            "reward_template_digest": "a",
            "policy_template_digest": "b",
            "settings_digest": "c",
            "prompt": "p",
            "prompt_token_ids": [1],
            "sampling": Sampling(max_tokens=8),
            "requested": requested or len(candidates),
            "candidates": candidates,
            "selected": None,
            "status": "ok",
            **changes,
        }
    )


def test_a_copy_of_a_record_is_what_pydantic_makes_of_it():
    one = candidate(1.0)
    ours, theirs = (
        copied(one, update={"disagreement": 2.0}) for copied in (Candidate.model_copy, BaseModel.model_copy)
    )
    assert (one.disagreement, ours.disagreement) == (None, 2.0)
    assert ours == theirs == pickle.loads(pickle.dumps(ours))
    assert ours.model_fields_set == theirs.model_fields_set
    assert candidate(1.0).model_copy() == one
    with pytest.raises(ValidationError):
        ours.reward = 3.0  # type: ignore[misc]


def test_best_is_the_highest_reward_and_the_earliest_of_a_tie():
    assert group(candidate(0.1), candidate(0.9), candidate(0.9)).best == 1


def test_a_truncated_or_empty_candidate_wins_only_when_no_complete_one_exists():
    truncated, empty = candidate(9.0, finish="length"), candidate(8.0, text=" ")
    assert group(truncated, empty, candidate(0.1)).best == 2
    assert group(empty, truncated).best == 1


def test_without_a_scored_candidate_there_is_no_best():
    assert group(candidate(None), candidate(None)).best is None


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_best_only_sees_order(rewards):
    """A strictly increasing transform of the reward changes nothing (multiplying by 4 is exact in floats)."""
    plain = group(*(candidate(reward) for reward in rewards)).best
    assert group(*(candidate(4 * reward) for reward in rewards)).best == plain == rewards.index(max(rewards))


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": Sampling(max_tokens=8, temperature=0.7)},
        {"sampling": Sampling(max_tokens=8, top_p=0.9)},
        {"sampling": Sampling(max_tokens=8, top_k=5)},
        {"store": False},
        {"requested": 3},
        {"stop_reason": "gain_below_price"},
        {"stop_reason": "probe"},
        {"policy_id": "pol-" + "0" * 16, "candidates": (candidate(0.1), candidate(0.2, policy=POLICY))},
    ],
)
def test_a_group_teaches_only_as_whole_unchanged_draws_of_the_policy(change):
    full = group(candidate(0.1), candidate(0.2))
    assert full.is_unbiased
    assert full.model_copy(update={"stop_reason": "holdout"}).is_unbiased
    assert not full.model_copy(update=change).is_unbiased


def test_an_unscored_candidate_makes_a_group_unusable():
    assert not group(candidate(0.1), candidate(None)).is_unbiased


def test_who_answered_is_who_drew_what_is_served():
    student = "pol-" + "1" * 16
    mixed = group(candidate(0.9, policy=student), candidate(0.1))
    assert [mixed.model_copy(update={"selected": i}).answered_by for i in (0, 1, None)] == [student, POLICY, POLICY]


def test_a_ledger_record_survives_the_journey_bit_for_bit():
    original = group(candidate(0.1 + 0.2), candidate(1 / 3))
    assert LEDGER_RECORD.validate_json(original.model_dump_json()) == original


def test_rewards_and_logprobs_are_finite():
    for field, value in (("reward", float("nan")), ("logprobs", [float("-inf"), 0.0])):
        raw = json.loads(candidate(0.1).model_dump_json()) | {field: value}
        with pytest.raises(ValidationError):
            Candidate.model_validate(raw)


def test_a_method_has_the_vetted_defaults_and_no_foreign_parameters():
    assert Method(type="jbond").spec == JBondSpec()
    assert Method.model_validate({"type": "bon_forward_kl", "bon_forward_kl": {"n": 8}}).spec == BonForwardKlSpec(n=8)
    with pytest.raises(ValidationError, match="parameters of jbond given for method bon_forward_kl"):
        Method.model_validate({"type": "bon_forward_kl", "jbond": {}})


@pytest.mark.parametrize(
    ("method", "n", "aims"),
    [
        ({"type": "offline_bond"}, 4, {"n": 4, "backward_n": 5}),
        ({"type": "offline_bond", "offline_bond": {"backward_n": 9}}, 4, {"n": 4, "backward_n": 9}),
        ({"type": "offline_bond", "offline_bond": {"n": 8}}, 64, {"n": 8, "backward_n": 80}),
        ({"type": "token_bond"}, 64, {"n": 80}),
        ({"type": "bon_sft"}, 64, {"n": 16}),  # as many candidates as a prompt mostly has
        ({"type": "bond"}, 16, {"n": 20}),
        ({"type": "bond"}, 4096, {"n": 4096}),
        ({"type": "vbon"}, 64, {"n": 64}),
        ({"type": "jbond"}, 64, {}),
        ({"type": "iterative_bond"}, 64, {"n": 2}),
    ],
)
def test_a_method_aims_at_the_jobs_n_unless_it_says_otherwise(method, n, aims):
    job = JobSpec.model_validate({"method": method, "n": n})
    assert job.method.spec.model_dump(include=aims.keys()) == aims
    assert JobSpec.model_validate_json(job.model_dump_json()) == job


def test_a_circles_turns_aim_at_its_n():
    circle = CircleSpec.model_validate({"n": 3})
    again = CircleSpec.model_validate_json(circle.model_dump_json())
    assert again.job("default", 1, None).method.spec == OfflineBondSpec(n=3, backward_n=3)


@pytest.mark.parametrize(
    ("method", "log_aim"),
    [
        ({"type": "offline_bond"}, math.log(20)),
        ({"type": "token_bond"}, math.log(20)),
        ({"type": "offline_bond", "offline_bond": {"jeffreys_weight": 0}}, math.log(16)),
        ({"type": "jbond", "jbond": {"steps": 1_000_000, "anchor_rate": 1}}, 1_000_001 * math.log(2)),
        ({"type": "iterative_bond", "iterative_bond": {"steps": 101, "anchor_steps": 50}}, math.log(2**3)),
        ({"type": "rloo"}, None),
    ],
)
def test_how_far_a_method_goes(method, log_aim):
    found = Method.model_validate(method).spec.log_aim
    assert found == (None if log_aim is None else pytest.approx(log_aim))


@pytest.mark.parametrize(
    "method",
    [
        {"type": "unheard-of"},
        {"type": "jbond", "jbond": {"jeffreys_weight": 1.5}},
        {"type": "jbond", "jbond": {"learning_rate": float("nan")}},
        {"type": "bon_regression", "bon_regression": {"n": 1}},
        {"type": "bon_regression", "bon_regression": {"huber_delta": 0}},
        {"type": "bonbon_consistent", "bonbon_consistent": {"candidates_per_prompt": 1}},  # nothing to compare
        {"type": "jbond", "jbond": {"lora_rank": 7}},
        {"type": "jbond", "jbond": {"beta": 0.5}},
        {"type": "iterative_bond", "iterative_bond": {"n": 4, "anchor_samples": 3}},
        {"type": "vbon", "vbon": {"samples_per_prompt": 1}},
        {"type": "vbon", "vbon": {"clip_range": 1}},
        {"type": "vbon", "vbon": {"likelihood": "upper"}},
        {"type": "vbon", "vbon": {"gradient": "ppo"}},
        {"type": "vbon", "vbon": {"likelihood": "exact", "quantiles": "mid_rank"}},  # its F is strict
        {"type": "vbon", "vbon": {"quantiles": "learned_law"}},
        {"type": "bond", "bond": {"quantiles": "learned_head"}},
        {"type": "bon_regression", "bon_regression": {"quantiles": "counted"}},
        {"type": "rloo", "rloo": {"kl_strength": 0}},
        {"type": "bonbon", "bonbon": {"imitation_weight": 1.5}},
        {"type": "dpo", "dpo": {"beta": 0}},
        {"type": "interpolation"},
        {"type": "interpolation", "interpolation": {"policy": "../etc", "share": 0.5}},
        {"type": "interpolation", "interpolation": {"policy": "pol-0123456789abcdef", "share": 1}},
        {"type": "bond", "interpolation": {"policy": "pol-0123456789abcdef"}},
    ],
)
def test_a_spec_out_of_range_or_unknown_is_refused(method):
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"method": method})
