"""Which arm answers a request, and what a record adds to the statistics of an experiment: pure functions.

Owns: the assignment (sticky over gateways because it only hashes), the sums per arm and their intervals. Does not
own: the experiments themselves (experiment_store.py), delivering the sums (the ledger's drainer does, in the
script that delivers the record they come from), nor deciding by them: promotion is policies.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final

from bon_algos.contracts import (
    Arm,
    ArmReason,
    CandidateGroup,
    Experiment,
    ExperimentArm,
    Exposure,
    Outcome,
    PolicyRecord,
    Route,
    Trial,
)
from service.catalogue import Snapshot
from service.errors import InvalidField, PolicyNotServed, PolicyRetired
from service.headers import ARM

BUCKETS: Final = 10_000
_Z_95: Final = 1.959964

# --- assignment ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assignment:
    """Who answers a request, and why."""

    arm: Arm
    reason: ArmReason
    experiment_id: str | None = None
    """Set when the request counts in an experiment: as an exposure, or as forced."""
    warnings: tuple[str, ...] = ()


def bucket(unit: str, salt: str) -> int:
    """Where a unit falls in an experiment, 0..9,999: the same on every gateway and after every restart."""
    digest = blake2b(unit.encode(), key=salt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def arm_of(bucket_number: int, arms: Sequence[ExperimentArm]) -> Arm:
    """The arm whose share of the cumulative weights holds the bucket.

    When one arm's weight is raised and no other's is, every bucket it held stays with it: its start can only fall,
    its end only rise.
    """
    upper = 0
    for entry in arms:
        upper += entry.weight
        if bucket_number < upper:
            return entry.arm
    raise ValueError(f"weights sum to {upper}, not {BUCKETS}")


def assign(
    route: Route,
    *,
    experiment: Experiment | None,
    live: PolicyRecord | None,
    canary: PolicyRecord | None = None,
    served: frozenset[str],
    unit: str,
    n: int | None,
    forced: Arm | None = None,
) -> Assignment:
    """Which arm answers. Pure.

    experiment: the one running on the route. live: the route's promoted policy. canary: the one
    that is tried on a share of it. served: see Snapshot. unit: whom
    the assignment sticks to. n: what the request names, at most the route's cap; None: nothing.
    forced: parsed from `x-bonsai-arm`. Raises PolicyNotServed where only other weights could answer.
    """
    if forced is not None:
        counts = experiment is not None and any(entry.arm == forced for entry in experiment.arms)
        warnings = _passed_over(n, forced)
        named = experiment.id if experiment and counts else None
        return _served(Assignment(forced, "forced", named, warnings=warnings), route, served)
    if experiment is not None:
        return _served(_assign_experiment(route, experiment, served, unit, n), route, served)
    answered = _assign_route(route, live, served, n)
    return answered if route.canary is None else _assign_canary(route.canary, canary, answered, route, served, unit, n)


def _passed_over(n: int | None, forced: Arm) -> tuple[str, ...]:
    if n in (None, forced.n):
        return ()
    return (f"the forced arm draws {forced.n}: that {n} were asked for was passed over",)


def _assign_experiment(
    route: Route, experiment: Experiment, served: frozenset[str], unit: str, n: int | None
) -> Assignment:
    asked = route.default_n if n is None else n
    if asked > max(entry.arm.n for entry in experiment.arms):
        policy = route.best_of_n_policy if route.best_of_n_policy in served else route.base_policy
        return Assignment(Arm(policy=policy, n=asked), "n_above_equivalent")
    arm = arm_of(bucket(unit, experiment.salt), experiment.arms)
    if n is not None and n < arm.n:
        return Assignment(Arm(policy=arm.policy, n=n), "n_below_arm")
    return Assignment(arm, "experiment", experiment.id)


def _assign_route(route: Route, live: PolicyRecord | None, served: frozenset[str], n: int | None) -> Assignment:
    asked = route.default_n if n is None else n
    teacher = Arm(policy=route.base_policy, n=asked)
    if route.live_policy is None:
        return Assignment(teacher, "default")
    if live is None or live.id not in served:
        return Assignment(teacher, "default", warnings=("the live policy is not served: best-of-n answered",))
    if asked > live.n_equivalent:
        return Assignment(Arm(policy=route.best_of_n_policy, n=asked), "n_above_equivalent")
    return Assignment(Arm(policy=live.id, n=1), "live")


def _assign_canary(
    trial: Trial,
    canary: PolicyRecord | None,
    otherwise: Assignment,
    route: Route,
    served: frozenset[str],
    unit: str,
    n: int | None,
) -> Assignment:
    """The canary answers its share of what it stands in for; where it is not served, whoever would have."""
    asked = route.default_n if n is None else n
    if canary is None or asked > canary.n_equivalent or bucket(unit, trial.salt) >= trial.share * BUCKETS:
        return otherwise
    if canary.id not in served:
        return replace(otherwise, warnings=(*otherwise.warnings, "the canary is not served: it was passed over"))
    return Assignment(Arm(policy=canary.id, n=1), "canary", trial.id)


def _served(assignment: Assignment, route: Route, served: frozenset[str]) -> Assignment:
    # The base is what the engine was started with: whether it answers, the call itself says.
    policy = assignment.arm.policy
    if policy != route.base_policy and policy not in served:
        raise PolicyNotServed("the engine does not serve this arm's policy at the moment")
    return assignment


def parse_forced_arm(header: str, route: Route, snapshot: Snapshot) -> Arm:
    """`POLICY:N` of `x-bonsai-arm`; POLICY is a policy id, `base` or `live`. Raises InvalidField, PolicyRetired."""
    name, separator, number = header.partition(":")
    if not separator or not number.isascii() or not number.isdigit() or not 1 <= len(number) <= 6:
        raise InvalidField(f"{ARM} must be POLICY:N", param=ARM)
    require_n(int(number), route.n_cap, ARM)
    arm = Arm(policy=policy_named(name, route, snapshot, ARM), n=int(number))
    record = snapshot.policies.get(arm.policy)
    if record is not None and record.state in ("retired", "failed") and arm.policy not in snapshot.served:
        raise PolicyRetired("the policy was retired or failed, and is served no more")
    return arm


def policy_named(name: str, route: Route, snapshot: Snapshot, param: str) -> str:
    """The policy id that `base`, `live`, a tag or an id stands for. Raises InvalidField."""
    if name == "base":
        return route.base_policy
    if name == "live":
        if route.live_policy is None:
            raise InvalidField("the route has no live policy", param=param)
        return route.live_policy
    name = snapshot.tags.get(name, name)
    if name not in snapshot.policies:
        raise InvalidField("neither a known policy nor base or live", param=param, code="policy_not_found")
    return name


def require_n(n: int, n_cap: int, param: str) -> None:
    """Raises InvalidField unless n is in 1..n_cap."""
    if not 1 <= n <= n_cap:
        raise InvalidField(f"n must be in 1..{n_cap}", param=param)


def exposure_of(group: CandidateGroup) -> Exposure:
    """That a unit met the group's arm."""
    return Exposure(
        id=f"exposure_{group.id}",
        tenant=group.tenant,
        created_at=group.created_at,
        group_id=group.id,
        route=group.route,
        experiment=group.experiment,
        arm=group.arm,
        arm_reason=group.arm_reason,
    )


# --- statistics ------------------------------------------------------------------------------------------


def statistics_increments(record: Exposure | CandidateGroup | Outcome) -> dict[str, float]:
    """What one ledger record adds to `experiment_stats_key(record.experiment)`, field -> summand; a trial is counted
    as an experiment is.

    Empty for a record of no experiment. A forced request is counted under `forced` alone. The reward is the served
    candidate's: with its group where it was known at the reply, with the Outcome of a single candidate where not.
    """
    if record.experiment is None:
        return {}
    if record.arm_reason == "forced":
        sums = {"forced": 1.0} if isinstance(record, Exposure) else {}
    elif record.arm_reason not in ("experiment", "canary", "shadow"):
        sums = {}
    elif isinstance(record, Exposure):
        sums = {"exposures": 1.0}
    elif isinstance(record, CandidateGroup):
        sums = _group_sums(record)
    else:
        sums = _reward_sums(record.rewards[0] if len(record.rewards) == 1 else None)
    return {f"{record.arm}|{name}": value for name, value in sums.items()}


def _group_sums(group: CandidateGroup) -> dict[str, float]:
    sums = {
        "candidate_tokens": float(sum(len(candidate.token_ids) for candidate in group.candidates)),
        "engine_seconds": group.engine_seconds,
    }
    if group.selected is None:
        return sums
    answer = group.candidates[group.selected]
    return {
        **sums,
        "answers": 1.0,
        "completion_tokens": float(len(answer.token_ids)),
        **_reward_sums(answer.reward),
    }


def _reward_sums(reward: float | None) -> dict[str, float]:
    if reward is None:
        return {}
    return {"scored": 1.0, "reward_sum": reward, "reward_sq": reward * reward}


def mean_interval(count: float, total: float, squares: float) -> dict[str, float] | None:
    """Mean and its 95 % normal interval from n, Σr and Σr²; None below two rewards.

    mean ± 1.96 · sqrt(s²/n) with s² = (Σr² − n·mean²)/(n − 1).
    """
    if count < 2:
        return None
    mean = total / count
    variance = max(0.0, (squares - count * mean * mean) / (count - 1))
    half = _Z_95 * math.sqrt(variance / count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def arm_object(entry: ExperimentArm, sums: Mapping[str, str]) -> dict[str, Any]:
    """One arm of `GET /experiments/{route}` from the hash of sums."""

    def total(name: str) -> float:
        return float(sums.get(f"{entry.arm}|{name}", 0))

    answers = total("answers")

    def per_answer(name: str) -> float | None:
        return total(name) / answers if answers else None

    return {
        "arm": str(entry.arm),
        "policy": entry.arm.policy,
        "n": entry.arm.n,
        "weight": entry.weight,
        "exposures": int(total("exposures")),
        "forced": int(total("forced")),
        "answers": int(answers),
        "scored": int(total("scored")),
        "reward": mean_interval(total("scored"), total("reward_sum"), total("reward_sq")),
        "completion_tokens_per_answer": per_answer("completion_tokens"),
        "candidate_tokens_per_answer": per_answer("candidate_tokens"),
        "engine_seconds_per_answer": per_answer("engine_seconds"),
    }
