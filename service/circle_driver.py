"""Drives circles: looks at the facts, has the next step decided, carries it out, writes it down.

Owns: in which order that happens, so that a gateway that dies anywhere in it is followed by one that finds the same
facts and does the same once more, to no second effect. Does not own: the rules (circle_rules.py), jobs, trials,
promotion: those are done as an operator does them, through the same doors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import Any, Final, Literal, TypeVar, assert_never, cast

from pydantic import ValidationError
from redis.asyncio import Redis

from bon_algos.contracts import (
    CIRCLES_LEASE,
    LEDGER_COUNTS,
    Circle,
    Interval,
    JobState,
    PolicyRecord,
    PolicyReport,
    Route,
    Turn,
    of_tenant,
)
from service.access import Caller
from service.catalogue import Catalogue, Snapshot
from service.circle_rules import (
    Begin,
    CancelJob,
    Decision,
    End,
    Facts,
    JobFacts,
    Promote,
    Prove,
    Stop,
    Submit,
    TrialFacts,
    Try,
    Wait,
    decide,
    kl_base_of,
    needs_groups,
    turns_kept,
)
from service.circles import Circles
from service.curve import Curves
from service.dispatch import Dispatcher
from service.errors import CircleNotFound, Conflict, GatewayError, InvalidField, JobNotFound, NotFound, ReportNotFound
from service.fresh_groups import FreshCurves
from service.idempotency import Idempotency
from service.jobs import Jobs
from service.leadership import Leadership
from service.policies import Policies, Replaces
from service.preconditions import ANY, Precondition
from service.report_files import read_report, with_report
from service.store import translated
from service.trials import Trials

log = logging.getLogger("bonsai.circle")
LEASE_PASSES: Final = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Means:
    """What circles are driven with."""

    catalogue: Catalogue
    jobs: Jobs
    dispatcher: Dispatcher
    policies: Policies
    trials: Trials
    curves: Curves
    artefacts: Path


class CircleDriver:
    """All circles of one Redis; one gateway at a time drives them."""

    def __init__(self, redis: Redis, means: Means, *, seconds: float) -> None:
        """seconds: between two looks."""
        self.circles = Circles(redis)
        self._redis = redis
        self._means = means
        self._fresh = FreshCurves(means.curves)
        self._seconds = seconds
        self._leadership = Leadership(redis, CIRCLES_LEASE, seconds=LEASE_PASSES * seconds)

    async def run(self) -> None:
        """Drive until cancelled."""
        while True:
            try:
                if await self._leadership.is_ours():
                    for circle in await self.circles.list():
                        await self.step(circle)
            except GatewayError as error:
                log.warning("circles wait: %s", error.message)
            await asyncio.sleep(self._seconds)

    async def step(self, circle: Circle) -> None:
        """One look at a circle and what follows from it. What fails with one keeps it from no other."""
        try:
            facts = await self._facts(circle)
            if facts is not None:
                decision = decide(circle, facts)
                await self._carry_out(circle, facts, decision)
        except GatewayError as error:
            log.warning("the circle of %s waits: %s", circle.route, error.message)
            await self._note(circle, f"tried, and tries again: {error.message}")
        except ValueError as error:  # of which only the kind is told: its words may hold what was sent
            log.error("the circle of %s waits: a record of it is damaged (%s)", circle.route, type(error).__name__)
            await self._note(circle, "tried, and tries again: a record of it is damaged")

    async def stop(
        self, routes: Sequence[str], reason: str, by: Caller, *, precondition: Precondition = ANY
    ) -> dict[str, BaseException]:
        """Stop these circles of the caller's tenant: all of them first, then their turns are ended, and what fails with
        one keeps it from no other. The routes whose circle could not be stopped, and why. A turn that could not be
        ended is tried again by whoever drives circles."""
        found = {
            route: await _apart(self.circles.stop(route, reason, by, precondition=precondition)) for route in routes
        }
        for route, circle in found.items():
            if isinstance(circle, Circle) and (failure := await _apart(self.step(circle))) is not None:
                log.error("the turn of the circle of %s is not ended yet", route, exc_info=failure)
        return {route: failure for route, failure in found.items() if isinstance(failure, BaseException)}

    # --- the facts ---------------------------------------------------------------------------------------

    async def _facts(self, circle: Circle) -> Facts | None:
        """None where the route is gone."""
        await self._means.catalogue.refresh()
        snapshot = self._means.catalogue.of(circle.tenant)
        route, turn = snapshot.routes.get(circle.route), circle.turn
        if route is None:
            return None
        policy = None if turn is None or turn.policy is None else snapshot.policies.get(turn.policy)
        facts = Facts(
            now=time(),
            route=route,
            counted=await self._counted(circle),
            job=None if turn is None or turn.job_id is None else await self._job(turn.job_id, circle.tenant),
            live=snapshot.policies.get(route.live_policy or ""),
            policy=policy,
            report=None if policy is None else await self._report(policy),
            is_served=policy is not None and policy.id in snapshot.served,
            trial=None if policy is None else await self._trial(route, policy.id),
        )
        if not needs_groups(circle, facts):
            return facts
        return replace(facts, fresh=await self._fresh.of(circle, route, facts.counted))

    async def _counted(self, circle: Circle) -> int:
        with translated():
            told = await self._redis.hget(LEDGER_COUNTS, of_tenant(circle.tenant, circle.route))
        return int(told or 0)

    async def _job(self, job_id: str, tenant: str) -> JobFacts | None:
        try:
            job = await self._means.jobs.get(job_id, tenant)
        except JobNotFound:
            return None
        error = "" if job["error"] is None else f"{job['error']['code']}: {job['error']['message']}"
        return JobFacts(cast(JobState, job["status"]), job["bonsai"]["gpu_seconds"], job["fine_tuned_model"], error)

    async def _report(self, policy: PolicyRecord) -> PolicyReport | None:
        try:
            manifest = with_report(policy.manifest)
            content = await asyncio.to_thread(read_report, self._means.artefacts, manifest, "json")
            return PolicyReport.model_validate_json(content)
        except ReportNotFound:
            return None
        except ValidationError as error:
            log.error("the report of %s is of another version: %d faults", policy.id, error.error_count())
            return None

    async def _trial(self, route: Route, policy_id: str) -> TrialFacts | None:
        stage = route.stage_of(policy_id)
        if stage not in ("shadow", "canary"):
            return None
        shown = cast("dict[str, Any]", (await self._means.trials.describe(route, {}))[stage])
        reward = None if shown["reward"] is None else Interval(**shown["reward"])
        return TrialFacts(shown["exposures"], shown["answers"], shown["since"], reward)

    # --- what follows ------------------------------------------------------------------------------------

    async def _carry_out(self, circle: Circle, facts: Facts, decision: Decision) -> None:
        turn, by = circle.turn, _caller(circle)
        match decision:
            case Wait(reason):
                await self._note(circle, reason, facts)
            case Stop(reason):
                log.error("ALERT the circle of %s stops: %s", circle.route, reason)
                await self.circles.stop(circle.route, reason, by)
            case Begin():
                await self._begin(circle, facts)
            case _ if turn is None:
                raise AssertionError(f"{decision} without a turn")
            case Submit():
                await self._submit(circle, turn)
            case CancelJob(reason):
                await self._means.jobs.grant("cancel", cast(str, turn.job_id), by)
                await self._note(circle, reason, facts)
            case Prove(policy):
                seconds = 0.0 if facts.job is None else facts.job.seconds
                await self._go_on(circle, "circle_proving", turn, phase="proving", policy=policy, seconds=seconds)
            case Try(stage):
                await self._try(circle, turn, facts, stage)
            case Promote():
                await self._promote(circle, turn, facts)
            case End():
                await self._end(circle, turn, facts, decision)
            case _:
                assert_never(decision)

    async def _note(self, circle: Circle, reason: str, facts: Facts | None = None) -> None:
        """Only what is new is written."""
        update: dict[str, object] = {} if reason == circle.reason else {"reason": reason}
        job, turn = None if facts is None else facts.job, circle.turn
        if job is not None and turn is not None and turn.seconds != job.seconds:
            update["turn"] = turn.model_copy(update={"seconds": job.seconds})
        if update:
            await self.circles.note(circle, update)

    async def _begin(self, circle: Circle, facts: Facts) -> None:
        parent = circle.live_policy or facts.route.base_policy
        turn = Turn(number=circle.num_turns + 1, began_at=facts.now, parent=parent)
        log.info("turn %d of the circle of %s begins from %s", turn.number, circle.route, parent)
        fresh = {"since": facts.now, "counted": facts.counted}
        update = {"turn": turn, "num_turns": turn.number, "reason": "", **fresh}
        await self.circles.step(circle, "circle_turn", _caller(circle), update)

    async def _submit(self, circle: Circle, turn: Turn) -> None:
        spec, key = circle.spec.job(circle.route, turn.number, circle.live_policy), _key_of(circle, turn)
        try:
            submitted = await self._means.jobs.submit(spec, key, _caller(circle), model=turn.parent)
        except (InvalidField, NotFound) as error:
            await self._write_end(circle, turn, End("failed", error.message))
            return
        await self._go_on(circle, "circle_job", turn, job_id=submitted.job_id)
        await self._means.dispatcher.wake(submitted.job_id)

    async def _try(self, circle: Circle, turn: Turn, facts: Facts, stage: Literal["shadow", "canary"]) -> None:
        rule = circle.spec.shadow if stage == "shadow" else circle.spec.canary
        served = self._snapshot(circle).served
        await self._means.trials.start(
            cast(str, turn.policy), circle.route, stage, rule.share, served, None, _caller(circle)
        )
        await self._go_on(circle, f"circle_{stage}", turn, phase=stage, **_numbers(facts))

    async def _promote(self, circle: Circle, turn: Turn, facts: Facts) -> None:
        policy = cast(str, turn.policy)
        if facts.route.live_policy != policy:
            reason = f"turn {turn.number} of the circle: through the gate, shadow and canary"
            served, replaces = self._snapshot(circle).served, Replaces(policy=circle.live_policy)
            await self._means.policies.promote(
                policy, circle.route, reason, served, None, _caller(circle), replaces=replaces, circle=circle
            )
        log.info("turn %d of the circle of %s: %s is live", turn.number, circle.route, policy)
        update = {
            "live_policy": policy,
            "kl_base": circle.kl_base if turn.kl_base is None else turn.kl_base,
            "refusals": 0,
            "since": facts.now,
            "counted": facts.counted,
        }
        await self._write_end(circle, turn, End("promoted", ""), update)
        await self._means.catalogue.refresh()

    async def _end(self, circle: Circle, turn: Turn, facts: Facts, end: End) -> None:
        """The turn leaves nothing behind that works: its job is cancelled, its policy on trial no more."""
        log.log(
            logging.ERROR if end.stops else logging.WARNING,
            "%sturn %d of the circle of %s is %s: %s",
            *("ALERT " if end.stops else "", turn.number, circle.route, end.outcome, end.reason),
        )
        if end.outcome == "stopped":
            await self._cancel_job(circle, turn)
        await self._stop_trial(circle, turn)
        job = facts.job
        spent = turn if job is None else turn.model_copy(update={"seconds": job.seconds})
        await self._write_end(circle, spent.model_copy(update=_numbers(facts)), end)

    async def _write_end(
        self, circle: Circle, turn: Turn, end: End, update: Mapping[str, object] | None = None
    ) -> None:
        over = {"phase": "over", "ended_at": time(), "outcome": end.outcome, "reason": end.reason}
        kept = turns_kept((*circle.turns, turn.model_copy(update=over)), time())
        refused = {} if end.outcome in ("promoted", "stopped") else {"refusals": circle.refusals + 1}
        stopped = {"status": "stopped", "reason": end.reason} if end.stops else {}
        changed = {"turn": None, "turns": kept, **refused, **stopped, **(update or {})}
        await self.circles.step(circle, "circle_turn_over", _caller(circle), changed)

    async def _cancel_job(self, circle: Circle, turn: Turn) -> None:
        """Also one that was submitted and never written down."""
        job_id = turn.job_id or await self._means.jobs.submitted_as(_key_of(circle, turn))
        with suppress(Conflict, NotFound):  # it has ended
            if job_id is not None:
                await self._means.jobs.grant("cancel", job_id, _caller(circle))

    async def _stop_trial(self, circle: Circle, turn: Turn) -> None:
        with suppress(Conflict, NotFound):  # it is on no trial, or live by somebody else's will
            if turn.policy is not None:
                await self._means.trials.stop(turn.policy, circle.route, _caller(circle))

    async def _go_on(self, circle: Circle, event: str, turn: Turn, **changed: object) -> None:
        """Write down what was done. Where the turn was ended meanwhile it is taken back: whoever ended it could not
        see it yet."""
        done = turn.model_copy(update=changed)
        written = await self.circles.step(circle, event, _caller(circle), {"turn": done, "reason": ""})
        if written is None and await self._is_over(circle, turn):
            await self._cancel_job(circle, done)
            await self._stop_trial(circle, done)

    async def _is_over(self, circle: Circle, turn: Turn) -> bool:
        try:
            current = (await self.circles.get(circle.route, circle.tenant)).turn
        except CircleNotFound:
            return True
        return current is None or current.number != turn.number

    def _snapshot(self, circle: Circle) -> Snapshot:
        return self._means.catalogue.of(circle.tenant)


async def _apart(work: Awaitable[T]) -> T | BaseException:
    """What it came to, or its failure, whatever it is."""
    [outcome] = await asyncio.gather(work, return_exceptions=True)
    return outcome


def _caller(circle: Circle) -> Caller:
    """Who did it, as the audit says."""
    return Caller(f"circle:{circle.route}", circle.tenant, "operator")


def _key_of(circle: Circle, turn: Turn) -> Idempotency:
    """Of the turn and nothing else: the same turn never has two jobs, even where the circle's rules were changed."""
    named = f"circle-{circle.route}-{turn.number}-{turn.began_at}"
    return Idempotency.of(named, "circle", "", circle.tenant)


def _numbers(facts: Facts) -> dict[str, object]:
    """What a turn tells of its report."""
    report = facts.report
    if report is None:
        return {}
    judge = None if report.judge is None else report.judge.gain
    return {"reward_gain": report.reward.gain, "judge_gain": judge, "kl_base": kl_base_of(report)}
