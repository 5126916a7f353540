"""The data plane as one object, and the life of a request between its validation and its reply.

Owns: assignment, exposure, drawing by a strategy and the ledger in their order. Does not own: HTTP (routes/).
What is said yes to is on disk before it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import time
from typing import NamedTuple

from uuid_utils import uuid7

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import CandidateGroup, PolicyId, Route, Sampling
from bon_algos.vllm_protocol import Listener
from service.access import Caller
from service.best_of_n import Answer, Budget
from service.catalogue import Catalogue
from service.errors import InvalidField, RewardModelUnavailable
from service.experiments import Assignment, assign, exposure_of, parse_forced_arm
from service.feedback import FeedbackBook
from service.generation import (
    EncodedPrompt,
    GenerateRequest,
    asked_n,
    asked_timeout,
    budget_of,
    encode,
    fitting_max_tokens,
    require_sense,
    require_tokens,
    session_of,
    tags_of,
)
from service.learned import LearnedStrategies
from service.ledger import Ledger
from service.limits import Limits
from service.measurements import Measurements
from service.pool import EnginePool
from service.replays import Replays
from service.reward import RewardModel
from service.reward_test import RewardTest
from service.shadows import Shadows
from service.strategies import DistilledFirst, Fixed, Plan, answered, planned, share_of
from service.waves import Means


@dataclass(frozen=True)
class Serving:
    """What a request for text may touch; built once, at start-up."""

    engine: EnginePool
    reward_model: RewardModel
    reward_test: RewardTest
    tokenizer: ChatTokenizer
    ledger: Ledger
    measurements: Measurements
    catalogue: Catalogue
    replays: Replays
    feedback: FeedbackBook
    learned: LearnedStrategies
    limits: Limits
    shadows: Shadows
    window: int
    """Of the policy engine, tokens."""
    n_cap: int
    max_body_bytes: int
    settings_digest: str
    holdout_share: float
    """Of the requests, see `planned`."""


class Circumstances(NamedTuple):
    """What comes with a request beside its body."""

    query: Mapping[str, str]
    request_id: str
    caller: Caller
    unit: str | None
    """Header `x-bonsai-unit`."""
    forced_arm: str | None
    """Header `x-bonsai-arm`."""
    timeout: str | None
    """Header `x-bonsai-timeout`."""
    started: float
    """The monotonic clock when the request arrived."""


class Prepared(NamedTuple):
    """A request that nothing is wrong with: a group without candidates, and how to fill it."""

    group: CandidateGroup
    budget: Budget
    caller: Caller
    warnings: tuple[str, ...]
    plan: Plan

    @property
    def stops(self) -> tuple[int, ...]:
        """After how many candidates drawing may end; one number where that is known beforehand."""
        return self.plan.stops(self.group.arm.n)

    @property
    def policy(self) -> PolicyId | None:
        """Who answers; None where that depends on rewards."""
        return None if isinstance(self.plan, DistilledFirst) else self.group.policy_id

    def with_alternatives(self, count: int) -> Prepared:
        """The same; the engine tells so many alternatives to each token."""
        sampling = self.group.sampling.model_copy(update={"top_logprobs": count})
        return self._replace(group=self.group.model_copy(update={"sampling": sampling}))


def prepare(serving: Serving, request: GenerateRequest, around: Circumstances) -> Prepared:
    """Everything that can be refused is refused here, before any engine is asked. Raises GatewayError."""
    require_sense(request)
    snapshot = serving.catalogue.of(around.caller.tenant)
    route = snapshot.route(request.route)
    around.caller.require_route(route.name)
    require_tokens(request.logit_bias, serving.tokenizer.vocabulary_size)
    n = asked_n(request.n, around.query, min(serving.n_cap, route.n_cap))
    prompt = encode(request, serving.tokenizer, serving.window)
    max_tokens = fitting_max_tokens(request.max_tokens, route.max_tokens, len(prompt.token_ids), serving.window)
    assignment = assign(
        route,
        experiment=snapshot.running(route.name),
        live=snapshot.live(route),
        canary=snapshot.canary(route),
        served=snapshot.served,
        unit=around.unit or request.unit or request.user or around.request_id,
        n=n,
        forced=None if around.forced_arm is None else parse_forced_arm(around.forced_arm, route, snapshot),
    )
    sampling, group_id = request.sampling(max_tokens), f"resp_{uuid7().hex}"
    settle = partial(
        planned,
        route,
        assignment,
        n,
        serving.learned.of(route),
        served=snapshot.served,
        is_policy_law=sampling.is_policy_law,
        holdout_share=serving.holdout_share,
    )
    assignment, plan = _scorable(settle, share_of(group_id), serving, request, prompt)
    timeout_ms = asked_timeout(request.timeout_ms, around.timeout, route.deadline_ms)
    first = plan.stops(assignment.arm.n)[0]
    budget = budget_of(request, route, assignment.arm.n, around.started, first=first, timeout_ms=timeout_ms)
    group = _empty_group(serving, request, around.caller, assignment, prompt, sampling, route, group_id)
    group = group.model_copy(update={"stop_reason": plan.stop_reason}) if isinstance(plan, Fixed) else group
    return Prepared(group, budget, around.caller, _warnings(assignment, group), plan)


def _scorable(
    settle: Callable[..., tuple[Assignment, Plan]],
    position: float,
    serving: Serving,
    request: GenerateRequest,
    prompt: EncodedPrompt,
) -> tuple[Assignment, Plan]:
    """What answers. settle: `planned` but for the position. Raises RewardModelUnavailable, InvalidField."""

    def settled(position: float) -> tuple[Assignment, Plan]:
        assignment, plan = settle(position=position)
        if assignment.arm.n > 1 or request.wait_for_reward:
            serving.reward_test.require_passed()
            serving.reward_model.require_up()
            serving.reward_model.require_room(prompt.prompt, request.messages)
        return assignment, plan

    try:
        return settled(position)
    except (InvalidField, RewardModelUnavailable):
        # What one sample could answer is not refused because chance would have had n of it.
        return settled(1.0)


def _empty_group(
    serving: Serving,
    request: GenerateRequest,
    caller: Caller,
    assignment: Assignment,
    prompt: EncodedPrompt,
    sampling: Sampling,
    route: Route,
    group_id: str,
) -> CandidateGroup:
    return CandidateGroup(
        id=group_id,
        created_at=time(),
        tenant=caller.tenant,
        route=route.name,
        experiment=assignment.experiment_id,
        arm=assignment.arm,
        arm_reason=assignment.reason,
        session=session_of(request),
        user=request.user,
        tags=tags_of(request),
        policy_id=assignment.arm.policy,
        reward_model_id=serving.reward_model.model,
        reward_template_digest=serving.reward_model.template_digest,
        policy_template_digest=serving.tokenizer.template_digest,
        settings_digest=serving.settings_digest,
        prompt=prompt.prompt,
        messages=request.messages,
        prompt_token_ids=tuple(prompt.token_ids),
        sampling=sampling,
        requested=assignment.arm.n,
        candidates=(),
        softness=route.softness if assignment.arm.n > 1 else None,
        selected=None,
        status="unscored",
        store=caller.store if request.store is None else request.store,
    )


async def answer(
    serving: Serving, prepared: Prepared, *, wait_for_reward: bool, hear: Listener | None = None
) -> Answer:
    """Fill the group when it is its turn, and log it as made now. Raises the reason when nothing can be served; the
    group is logged all the same, unless it was not admitted or the engine never gave a candidate."""
    # Not when it was prepared: from this moment on the ledger knows that a record of it may come.
    group = prepared.group.model_copy(update={"created_at": time()})
    with serving.ledger.awaits(group.created_at):
        return await _answered(serving, prepared._replace(group=group), wait_for_reward=wait_for_reward, hear=hear)


async def _answered(serving: Serving, prepared: Prepared, *, wait_for_reward: bool, hear: Listener | None) -> Answer:
    group = prepared.group
    most = prepared.stops[-1]
    async with serving.limits.admitted(prepared.caller, group, most, prepared.budget.deadline) as admission:
        if group.experiment is not None:
            serving.ledger.append(exposure_of(group))
        means = Means(serving.engine, serving.reward_model, prepared.budget, hear)
        filled = await answered(prepared.plan, group, means, wait_for_reward=wait_for_reward)
        admission.group = filled.group
    serving.ledger.append(filled.group)
    if filled.failure is not None:
        raise filled.failure
    if filled.group.status == "single" and not filled.group.scored and not wait_for_reward:
        serving.measurements.start(filled.group)
    serving.shadows.start(filled.group)
    return filled._replace(waited=filled.waited + (admission.waited or 0.0))


def _warnings(assignment: Assignment, group: CandidateGroup) -> tuple[str, ...]:
    if group.sampling.temperature == 0 and group.requested > 1:
        return (*assignment.warnings, "temperature 0 makes all candidates alike: n buys nothing")
    return assignment.warnings


def ledger_warnings(serving: Serving) -> tuple[str, ...]:
    """What the caller should know of the ledger."""
    return () if serving.ledger.status.has_room else ("the ledger has no room: these candidates were not logged",)
