"""Does the circle close? Serve best-of-16, distil it, serve one sample: three seeds of the demo's job.

Prints the table of the README with its intervals, and claims what the project promises on two processor cores:
at least 90 % of the reward gain of best-of-16 with one sample, the gold reward up with it, at most twice the KL
of best-of-16, at most six minutes of training, of which a fifth at most for the evaluation. Every answer comes
through the public API; all that is measured is measured on prompts that nothing else has sent.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks import claims
from bon_algos.contracts import Interval, JobSpec, Method
from bon_algos.order import kl_bound
from bonsai.client import BonsaiClient, open_client
from bonsai.demo import measure, progress, traffic
from bonsai.demo.charts import plus_minus
from bonsai.demo.grammar import gold_reward
from bonsai.demo.job import METHODS, N, demo_job, finished, logged_prompts, served
from bonsai.demo.prompts import held_out_prompts, training_prompts
from bonsai.job_replies import JobEvent
from bonsai.up import Options, Stack, prepare, running_stack

REFERENCE_DRAWS = 64
POLICY_DRAWS = 32
LEAST_GAIN_SHARE = 0.9
MOST_KL = 2 * kl_bound(N)
MOST_TRAINING_SECONDS = 360.0
MOST_EVALUATION_SHARE = 0.2
COLUMNS = ("arm", "reward", "gold reward", "win rate, %", "share of gain, %", "KL, nats", "job, s")


class Seed(NamedTuple):
    """What one seed gave."""

    seed: int
    policy: measure.Pool
    quality: measure.Quality
    comparison: measure.Comparison
    training_seconds: float
    evaluation_seconds: float
    """Of these."""
    engine_difference: float
    """Nats per token between the engine that sampled and the library that measured the KL."""
    retokenised: float

    @property
    def kl(self) -> Interval:
        assert self.quality.kl_policy_reference is not None
        return self.quality.kl_policy_reference


def _traffic(method: str) -> list[str]:
    """The prompts that fill the ledger: the demo's, or for a method that draws no sample all that may be sent, each
    often enough for 64 candidates."""
    return logged_prompts() if method == "bond" else [*training_prompts()] * 4


async def _fill_ledger(client: BonsaiClient, prompts: Sequence[str], console: Console) -> None:
    with progress.bar(console) as bar:
        task = bar.add_task(f"best of {N}", total=len(prompts), note="")

        async def ask(prompt: str) -> None:
            await client.generate(prompt, n=N)

        await traffic.in_parallel(prompts, ask, concurrency=8, advance=lambda: bar.advance(task))


async def _reference(client: BonsaiClient) -> measure.Pool:
    prompts = held_out_prompts()
    return measure.pool_of(
        prompts, await traffic.draw(client, "base", prompts, REFERENCE_DRAWS, concurrency=4), gold_reward
    )


async def _one_seed(
    client: BonsaiClient, console: Console, stack: Stack, reference: measure.Pool, spec: JobSpec
) -> Seed:
    from benchmarks.drift import drift_of

    console.print(f"seed {spec.seed}")
    with progress.JobDisplay(console, job := await client.distill(spec)) as display:
        job = await finished(client, job, display.update)
    policy = await served(client, job.fine_tuned_model or "")
    assert policy.manifest is not None
    adapter = stack.state.artefacts / "policies" / policy.manifest.digest
    prompts = held_out_prompts()
    drawn = await traffic.draw(client, policy.id, prompts, POLICY_DRAWS, concurrency=8)
    drift = await asyncio.to_thread(drift_of, stack.plan.policy.path, adapter, prompts, drawn)
    pool = measure.pool_of(prompts, drawn, gold_reward)
    return Seed(
        spec.seed,
        pool,
        measure.quality_of_one(pool, reference, drift.kl_policy_reference),
        measure.compare(pool, reference, N),
        job.details.seconds,
        seconds_of("evaluating", [event async for event in client.events(job.id)]),
        drift.engine_difference,
        drift.retokenised,
    )


def seconds_of(phase: str, events: Sequence[JobEvent]) -> float:
    """How long a job was in a phase: from each event that tells of it to the next one."""
    times = [int(event.id.partition("-")[0]) / 1000 for event in events]
    return sum(end - begin for event, begin, end in zip(events, times, times[1:], strict=False) if event.phase == phase)


def _cells(name: str, quality: measure.Quality, share: Interval | None, seconds: float | None) -> tuple[str, ...]:
    return (
        name,
        plus_minus(quality.reward),
        plus_minus(quality.gold),
        plus_minus(quality.win_rate, scale=100, digits=1),
        plus_minus(share, scale=100, digits=1),
        plus_minus(quality.kl_policy_reference),
        "–" if seconds is None else f"{seconds:.0f}",
    )


def rows_of(reference: measure.Pool, seeds: Sequence[Seed]) -> list[tuple[str, ...]]:
    """The table: both arms of the reference, every seed, and the seeds together."""
    one, best = measure.quality_of_one(reference, None, None), measure.quality_of_best(reference, N)
    rows = [
        _cells("one sample, reference", one, None, None),
        _cells(f"best of {N}, reference", best, None, None),
    ]
    rows += [
        _cells(f"one sample, distilled, seed {s.seed}", s.quality, s.comparison.gain_share, s.training_seconds)
        for s in seeds
    ]
    if len(seeds) > 1:
        pooled, share = together(reference, seeds)
        seconds = float(np.median([seed.training_seconds for seed in seeds]))
        rows.append(_cells(f"one sample, distilled, {len(seeds)} seeds", pooled, share, seconds))
    return rows


def together(reference: measure.Pool, seeds: Sequence[Seed]) -> tuple[measure.Quality, Interval]:
    """All seeds as one policy that draws its seed at random: every prompt's draws of all seeds side by side."""
    pools = [seed.policy for seed in seeds]
    draws = min(pool.draws for pool in pools)
    parts = [pool.part(slice(draws)) for pool in pools]
    pool = measure.Pool(
        reference.prompts,
        np.hstack([part.reward for part in parts]),
        np.hstack([part.gold for part in parts]),
        np.hstack([part.is_complete for part in parts]),
        np.hstack([part.tokens for part in parts]),
    )
    # Half-widths are averaged as if the seeds erred together: no narrower than any truth.
    kl = Interval(
        mean=float(np.mean([seed.kl.mean for seed in seeds])),
        low=float(np.mean([seed.kl.low for seed in seeds])),
        high=float(np.mean([seed.kl.high for seed in seeds])),
    )
    return measure.quality_of_one(pool, reference, kl), measure.compare(pool, reference, N).gain_share


def claims_of(reference: measure.Pool, seeds: Sequence[Seed]) -> list[claims.Claim]:
    """Each claim about the worst seed, and the share about all of them with its lower 95 % bound."""
    _, share = together(reference, seeds)
    return [
        claims.at_least("share of the gain, lower 95 % bound, all seeds", share.low, LEAST_GAIN_SHARE),
        claims.at_least(
            "share of the gain, mean, worst seed",
            min(seed.comparison.gain_share.mean for seed in seeds),
            LEAST_GAIN_SHARE,
        ),
        claims.above(
            "gold gain over one sample, lower 95 % bound, worst seed",
            min(seed.comparison.gold_gain.low for seed in seeds),
            0.0,
        ),
        claims.at_most("KL to the reference, nats, worst seed", max(seed.kl.mean for seed in seeds), MOST_KL),
        claims.at_most(
            "training and evaluation, seconds, slowest seed",
            max(seed.training_seconds for seed in seeds),
            MOST_TRAINING_SECONDS,
        ),
        claims.at_most(
            "of these for the evaluation, worst seed",
            max(seed.evaluation_seconds / seed.training_seconds for seed in seeds),
            MOST_EVALUATION_SHARE,
        ),
    ]


def figures_of(reference: measure.Pool, seeds: Sequence[Seed], method: Method) -> dict[str, object]:
    """Everything measured, as JSON can hold it."""
    return {
        "method": method.model_dump(mode="json", exclude_none=True),
        "n": N,
        "prompts": len(reference.prompts),
        "one": measure.quality_of_one(reference, None, None).model_dump(),
        "best": measure.quality_of_best(reference, N).model_dump(),
        "seeds": [
            {
                "seed": seed.seed,
                "quality": seed.quality.model_dump(),
                "comparison": seed.comparison.model_dump(),
                "training_seconds": seed.training_seconds,
                "evaluation_seconds": seed.evaluation_seconds,
                "engine_difference": seed.engine_difference,
                "retokenised": seed.retokenised,
            }
            for seed in seeds
        ],
    }


async def measured(specs: Sequence[JobSpec], console: Console, directory: Path) -> tuple[measure.Pool, list[Seed]]:
    """The reference's pool and every seed's numbers, from a stack that runs for this alone."""
    async with (
        running_stack(prepare(Options(directory=directory, port=0))) as stack,
        open_client(stack.url, api_key=stack.api_key) as client,
    ):
        await _fill_ledger(client, _traffic(specs[0].method.type), console)
        reference = await _reference(client)
        return reference, [await _one_seed(client, console, stack, reference, spec) for spec in specs]


def main() -> int:
    parser = claims.arguments(__doc__ or "")
    parser.add_argument("--method", choices=METHODS, default="bond", help="how to distil")
    parser.add_argument("--seeds", type=int, default=3, help="how often to distil, each time with another seed")
    parser.add_argument("--quick", action="store_const", dest="seeds", const=1, help="one seed")
    options = parser.parse_args()
    console = progress.fit(Console(highlight=False))
    specs = [demo_job(seed, options.method) for seed in range(options.seeds)]
    with tempfile.TemporaryDirectory(prefix="bonsai-") as directory:
        reference, seeds = asyncio.run(measured(specs, console, Path(directory)))
    rows = rows_of(reference, seeds)
    title = f"The circle: {options.method}, n = {N}, {len(reference.prompts)} held-out prompts, 95 % intervals"
    console.print(claims.table(title, COLUMNS, rows))
    if options.markdown is not None:
        options.markdown.write_text(claims.markdown(COLUMNS, rows))
    return claims.finish(
        claims_of(reference, seeds), options.json, figures_of(reference, seeds, METHODS[options.method]), console
    )


if __name__ == "__main__":
    sys.exit(main())
