"""The parts of the demo: each one drives the public API and shows what came back.

Owns how much each part asks for. Does not own their order or their time (`story.py`), the traffic (`traffic.py`), the
estimates (`measure.py`) or how they look (`screen.py`, `progress.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from rich.console import Console

from bonsai import machine
from bonsai.client import BonsaiClient
from bonsai.demo import progress, screen, traffic
from bonsai.demo.grammar import gold_reward
from bonsai.demo.job import CircleBroken, N, demo_job, finished, logged_prompts, popular_prompts, served
from bonsai.demo.measure import (
    Curve,
    Measured,
    Pool,
    Row,
    Speed,
    compare,
    curve_of,
    pool_of,
    quality_of_best,
    quality_of_one,
)
from bonsai.demo.prompts import held_out_prompts, training_prompts
from bonsai.generation_replies import Choice, Generation
from bonsai.job_replies import Job

ROUTE: Final = "default"

SHOWN: Final = 3
"""Prompts whose answers are shown side by side."""
UNITS: Final = 64
"""Units of the experiment."""
REFERENCE_DRAWS: Final = 2 * N
"""Draws of the reference for each held-out prompt: best-of-n from one half against one sample of the other."""
POLICY_DRAWS: Final = 12
"""Draws of the distilled policy for each held-out prompt."""
UNDER_WAY: Final = 8
"""Best-of-n requests at one time: enough to keep a small engine full, so that none waits long."""
ROUNDS: Final = 3
TIMED_PER_ROUND: Final = 7
SATURATED_SECONDS: Final = 2.0
SATURATED_SEQUENCES: Final = 64


async def show_best_of_n(client: BonsaiClient, console: Console) -> None:
    for prompt in training_prompts()[:SHOWN]:
        one = await client.generate(prompt, arm="base:1", wait_for_reward=True, store=False)
        best = await client.generate(prompt, n=N, wait_for_reward=True, return_candidates=True)
        if best.arm_reason != "default":
            raise CircleBroken(f"an earlier policy answers already, {best.arm}: give the demo a Redis of its own")
        gold = [gold_reward(prompt, choice.text) for choice in best.choices]
        screen.show_side_by_side(
            console, prompt, one, best, gold_reward(prompt, one.completion), gold_reward(prompt, best.completion)
        )
        if prompt == training_prompts()[0]:
            screen.show_candidates(console, best.choices, gold)


async def burst(client: BonsaiClient, console: Console) -> Curve:
    """Traffic that fills the ledger; what it shows of best-of-n, for n far beyond the traffic's own."""
    asked = list(enumerate(logged_prompts()))
    start = time.perf_counter()
    with progress.bar(console) as bar:
        task = bar.add_task(f"best of {N}", total=len(asked), note="")
        rewards: list[float] = []

        async def ask(item: tuple[int, str]) -> Generation:
            index, prompt = item
            answer = await client.generate(prompt, n=N, unit=f"reader-{index}", return_candidates=True)
            if answer.reward is not None:
                rewards.append(answer.reward)
            rate = (bar.tasks[task].completed + 1) / (time.perf_counter() - start)
            mean = f" · mean reward {np.mean(rewards):+.2f}" if rewards else ""
            bar.update(task, advance=1, note=f"{rate:.1f} answers/s{mean}")
            return answer

        answers = await traffic.in_parallel(asked, ask, concurrency=UNDER_WAY)
    seconds = time.perf_counter() - start
    console.print(
        f"  {len(asked)} answers and {len(asked) * N:,} scored candidates in {seconds:.0f} s; each candidate is in "
        "the ledger\n  with its tokens, log-probs and reward."
    )
    return _curve([prompt for _, prompt in asked], answers)


def _curve(prompts: Sequence[str], answers: Sequence[Generation]) -> Curve:
    """Best-of-k of the reference: up to n from every prompt's first answer, beyond it from the popular prompts."""
    drawn: dict[str, list[Choice]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        drawn.setdefault(prompt, []).extend(answer.choices)
    try:
        all_prompts = pool_of(list(drawn), [choices[:N] for choices in drawn.values()], gold_reward)
        popular = pool_of(popular_prompts(), [drawn[prompt] for prompt in popular_prompts()], gold_reward)
    except ValueError as reason:
        raise CircleBroken(f"the traffic's candidates cannot be compared: {reason}") from reason
    return curve_of(all_prompts, popular)


async def distil(client: BonsaiClient, console: Console) -> Job:
    spec = demo_job()
    job = await client.distill(spec)
    console.print(f"  {job.id} · method {spec.method.type} · for best of {spec.n}")
    with progress.JobDisplay(console, job) as display:
        job = await finished(client, job, display.update)
    console.print(f"  Done in {job.details.seconds:.0f} s.")
    screen.show_report(console, job)
    return job


async def published(client: BonsaiClient, console: Console, job: Job) -> str:
    """The job's policy once the engine has proved that it serves it."""
    policy = await served(client, job.fine_tuned_model or "")
    screen.show_policy(console, policy)
    return policy.id


async def experiment(client: BonsaiClient, console: Console, policy_id: str) -> None:
    await client.start_experiment(ROUTE, {("base", N): 5000, (policy_id, 1): 5000})
    prompts = training_prompts()
    asked = [(f"visitor-{index}", prompts[-1 - index % len(prompts)]) for index in range(UNITS)]
    with progress.bar(console) as bar:
        task = bar.add_task("units", total=UNITS, note="")

        async def ask(item: tuple[str, str]) -> None:
            unit, prompt = item
            await client.generate(prompt, unit=unit, wait_for_reward=True)

        await traffic.in_parallel(asked, ask, concurrency=UNDER_WAY, advance=lambda: bar.advance(task))
    screen.show_experiment(console, await client.experiment(ROUTE))
    await client.stop_experiment(ROUTE)


async def measure_arms(client: BonsaiClient, console: Console, policy_id: str, job: Job, curve: Curve) -> Measured:
    """The table of the three arms, on prompts that nobody has sent before."""
    prompts = held_out_prompts()
    arms = (("base:1", 1), (f"base:{N}", N), (f"{policy_id}:1", 1))
    with progress.bar(console) as bar:
        drawing = bar.add_task("draws", total=2 * len(prompts), note=f"{len(prompts)} held-out prompts")
        timing = bar.add_task("speed", total=ROUNDS * len(arms), note="the arms take turns")
        reference, policy = [
            await traffic.draw(client, name, prompts, draws, concurrency=4, advance=lambda: bar.advance(drawing))
            for name, draws in (("base", REFERENCE_DRAWS), (policy_id, POLICY_DRAWS))
        ]
        speeds = await traffic.speeds(
            client,
            arms,
            training_prompts(),
            rounds=ROUNDS,
            timed_per_round=TIMED_PER_ROUND,
            seconds=SATURATED_SECONDS,
            sequences=SATURATED_SEQUENCES,
            advance=lambda: bar.advance(timing),
        )
    try:
        before, after = (pool_of(prompts, drawn, gold_reward) for drawn in (reference, policy))
        return _measured(before, after, speeds, curve, policy_id, job)
    except ValueError as reason:
        raise CircleBroken(f"the draws cannot be compared: {reason}") from reason


def _measured(
    reference: Pool, policy: Pool, speeds: Sequence[Speed], curve: Curve, policy_id: str, job: Job
) -> Measured:
    one, best, distilled = speeds
    kl = None if job.details.report is None else job.details.report.kl_policy_reference
    return Measured(
        policy=policy_id,
        n=N,
        prompts=len(reference.prompts),
        one=Row(arm="one sample, reference", quality=quality_of_one(reference, None, None), speed=one),
        best=Row(arm=f"best of {N}, reference", quality=quality_of_best(reference, N), speed=best),
        distilled=Row(arm="one sample, distilled", quality=quality_of_one(policy, reference, kl), speed=distilled),
        comparison=compare(policy, reference, N),
        curve=curve,
        method=demo_job().method.type,
        training_seconds=job.details.seconds,
        machine=machine.describe(),
    )


async def promote(client: BonsaiClient, console: Console, policy_id: str) -> None:
    await client.promote(policy_id, route=ROUTE, override_reason="bonsai demo: measured on held-out prompts")
    answer = await client.generate(training_prompts()[0], n=N)
    console.print(f"  n={N} is now answered by [bold]{answer.arm}[/] (reason: {answer.arm_reason}).")
