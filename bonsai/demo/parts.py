"""The parts of the demo: each one drives the public API and shows what came back.

Owns how much each part asks for. Does not own their order or their time (`story.py`), the traffic (`traffic.py`), the
estimates (`measure.py`) or how they look (`screen.py`, `progress.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from rich.console import Console

from bonsai import machine
from bonsai.client import BonsaiClient, Job
from bonsai.demo import progress, screen, traffic
from bonsai.demo.grammar import gold_reward
from bonsai.demo.job import CircleBroken, N, demo_job, finished, logged_prompts, served
from bonsai.demo.measure import (
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

ROUTE: Final = "default"

SHOWN: Final = 3
"""Prompts whose answers are shown side by side."""
UNITS: Final = 160
"""Units of the experiment."""
REFERENCE_DRAWS: Final = 64
"""Draws of the reference for each held-out prompt."""
CURVE_DRAWS: Final = 256
CURVE_PROMPTS: Final = 32
"""Some of the prompts get more draws: as far as the curves over n go."""
POLICY_DRAWS: Final = 16
"""Draws of the distilled policy for each held-out prompt."""
UNDER_WAY: Final = 8
"""Best-of-n requests at one time: enough to keep a small engine full, so that none waits long."""
ROUNDS: Final = 3
TIMED_PER_ROUND: Final = 8
SATURATED_SECONDS: Final = 3.0
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


async def burst(client: BonsaiClient, console: Console) -> None:
    asked = list(enumerate(logged_prompts()))
    rewards: list[float] = []
    start = time.perf_counter()
    with progress.bar(console) as bar:
        task = bar.add_task(f"best of {N}", total=len(asked), note="")

        async def ask(item: tuple[int, str]) -> None:
            index, prompt = item
            answer = await client.generate(prompt, n=N, unit=f"reader-{index}")
            if answer.reward is not None:
                rewards.append(answer.reward)
            rate = (bar.tasks[task].completed + 1) / (time.perf_counter() - start)
            mean = sum(rewards) / max(1, len(rewards))
            bar.update(task, advance=1, note=f"{rate:.1f} answers/s · mean reward {mean:+.2f}")

        await traffic.in_parallel(asked, ask, concurrency=UNDER_WAY)
    seconds = time.perf_counter() - start
    console.print(
        f"  {len(asked)} answers and {len(asked) * N:,} scored candidates in {seconds:.0f} s; each candidate is in "
        "the ledger\n  with its tokens, log-probs and reward."
    )


async def distil(client: BonsaiClient, console: Console) -> Job:
    spec = demo_job()
    job = await client.distill(spec)
    console.print(f"  {job.id} · method {spec.method.type} · for best of {spec.n}")
    with progress.JobDisplay(console, job) as display:
        job = await finished(client, job, display.update)
    console.print(f"  Done in {job.seconds or 0:.0f} s.")
    screen.show_report(console, job)
    return job


async def published(client: BonsaiClient, console: Console, job: Job) -> str:
    """The job's policy once the engine has proved that it serves it."""
    policy = await served(client, job.policy or "")
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


async def measure_arms(client: BonsaiClient, console: Console, policy_id: str, job: Job) -> Measured:
    """The table of the three arms and the curves, on prompts that nobody has sent before."""
    prompts = held_out_prompts()
    arms = (("base:1", 1), (f"base:{N}", N), (f"{policy_id}:1", 1))
    plan = (
        ("base", prompts, REFERENCE_DRAWS),
        ("base", prompts[:CURVE_PROMPTS], CURVE_DRAWS - REFERENCE_DRAWS),
        (policy_id, prompts, POLICY_DRAWS),
    )
    with progress.bar(console) as bar:
        total = sum(len(some) * -(-draws // traffic.PER_REQUEST) for _, some, draws in plan)
        drawing = bar.add_task("draws", total=total, note=f"{len(prompts)} held-out prompts")
        timing = bar.add_task("speed", total=ROUNDS * len(arms), note="the arms take turns")
        reference, more, policy = [
            await traffic.draw(client, name, some, draws, concurrency=2, advance=lambda: bar.advance(drawing))
            for name, some, draws in plan
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
    deep = [[*first, *rest] for first, rest in zip(reference, more, strict=False)]
    try:
        return _measured(
            pool_of(prompts, reference, gold_reward),
            pool_of(prompts[:CURVE_PROMPTS], deep, gold_reward),
            pool_of(prompts, policy, gold_reward),
            speeds,
            policy_id,
            job,
        )
    except ValueError as reason:
        raise CircleBroken(f"the draws cannot be compared: {reason}") from reason


def _measured(reference: Pool, deep: Pool, policy: Pool, speeds: Sequence[Speed], policy_id: str, job: Job) -> Measured:
    """`deep` holds more draws of the reference for some of its prompts."""
    one, best, distilled = speeds
    kl = None if job.report is None else job.report.kl_policy_reference
    return Measured(
        policy=policy_id,
        n=N,
        prompts=len(reference.prompts),
        one=Row(arm="one sample, reference", quality=quality_of_one(reference, None, None), speed=one),
        best=Row(arm=f"best of {N}, reference", quality=quality_of_best(reference, N), speed=best),
        distilled=Row(arm="one sample, distilled", quality=quality_of_one(policy, reference, kl), speed=distilled),
        comparison=compare(policy, reference, N),
        curve=curve_of(reference, deep),
        method=demo_job().method.type,
        training_seconds=job.seconds or 0.0,
        machine=machine.describe(),
    )


async def promote(client: BonsaiClient, console: Console, policy_id: str) -> None:
    await client.promote(policy_id, route=ROUTE, override_reason="bonsai demo: measured on held-out prompts")
    answer = await client.generate(training_prompts()[0], n=N)
    console.print(f"  n={N} is now answered by [bold]{answer.arm}[/] (reason: {answer.arm_reason}).")
