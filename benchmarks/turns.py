"""Three turns of the circle with nobody at it, on the demo's models: what each turn earned, and what it cost.

One request begins it (`PUT /routes/default/circle`); after that there is nothing but traffic. Each turn waits for fresh
groups of the policy that is live, distils best-of-n of it, goes through the gate with the gold reward as the second
reward model, and is shadow, then canary, then live. Afterwards every policy that was live is measured on prompts that
nothing else has sent.

Turns multiply: three of n = 3 aim at best-of-27 of the base. The demo's gold reward falls for more than 64
(docs/log.md, "A gold reward that peaks"), so that a second turn with --n 16 is refused, and the circle stops by itself.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console

from benchmarks import claims
from bon_algos.contracts import Budgets, CircleSpec, Interval, Turn
from bon_algos.order import mean_interval
from bonsai.client import BonsaiClient, RunningCircle, open_client
from bonsai.demo import measure, progress, traffic
from bonsai.demo.charts import plus_minus
from bonsai.demo.grammar import gold_reward
from bonsai.demo.job import METHODS, logged_prompts
from bonsai.demo.prompts import held_out_prompts
from bonsai.up import Options, prepare, running_stack

TURNS: Final = 3
N: Final = 3
DRAWS: Final = 64
"""Of each prompt, to measure a policy by; and by half of the base's, what best-of-n of it wins against the others."""
ROUTE: Final = "default"
LEAST_GROUPS: Final = 1200
COLLECTING, OTHERWISE = 6, 1
"""Requests under way at one time: many while a turn waits for groups, one while a worker trains on the same cores."""
QUIET_SECONDS: Final = 0.5
"""Between two requests then."""
LOOK_EVERY: Final = 1.0
DEADLINE_SECONDS: Final = 3600.0
COLUMNS = ("one sample of", "reward", "gold reward", "win rate, %", "KL, nats", "tokens", "job, s", "turn, s")


def circle_spec(turns: int, n: int) -> CircleSpec:
    return CircleSpec.model_validate(
        {
            "method": METHODS["offline_bond"].model_dump(exclude_unset=True),  # how far it goes follows from n
            "n": n,
            "collect_share": 0.5,
            "held_out_fraction": 0.2,
            # What so few held-out prompts cannot tell from nothing.
            "gate": {"judge_margin": 0.5},
            "min_groups": LEAST_GROUPS,
            "max_groups": 4 * LEAST_GROUPS,
            "shadow": {"share": 0.3, "answers": 20},
            "canary": {"share": 0.3, "answers": 20},
            "max_turns": turns,
        }
    )


class Worth(NamedTuple):
    """What one sample of a policy is worth on prompts that nothing else has sent."""

    policy: str
    pool: measure.Pool
    quality: measure.Quality


async def unattended(client: BonsaiClient, console: Console, turns: int, n: int) -> RunningCircle:
    """Traffic until the circle has stopped, or for an hour: then the claims are of how far it came."""
    seen, told, prompts = await client.put_circle(ROUTE, circle_spec(turns, n)), "", cycle(logged_prompts())
    ends_at = time.monotonic() + DEADLINE_SECONDS
    while seen.status == "running" and time.monotonic() < ends_at:
        until = time.monotonic() + LOOK_EVERY
        while time.monotonic() < until:
            width = COLLECTING if seen.turn is None else OTHERWISE
            await asyncio.gather(*(client.generate(next(prompts), n=n) for _ in range(width)))
            if seen.turn is not None:
                await asyncio.sleep(QUIET_SECONDS)
        seen = await client.circle(ROUTE)
        phase = "collecting" if seen.turn is None else f"turn {seen.turn.number}: {seen.turn.phase}"
        if phase != told:
            console.print(f"{time.strftime('%H:%M:%S')}  {phase}  live: {seen.live_policy or 'base'}")
            told = phase
    console.print(f"{time.strftime('%H:%M:%S')}  {seen.status}: {seen.reason}")
    return seen


async def worth_of(client: BonsaiClient, policy: str, reference: measure.Pool | None, kl: Interval | None) -> Worth:
    prompts = held_out_prompts()
    drawn = await traffic.draw(client, policy, prompts, DRAWS, concurrency=4)
    pool = measure.pool_of(prompts, drawn, gold_reward)
    return Worth(policy, pool, measure.quality_of_one(pool, reference, kl))


async def _worths(client: BonsaiClient, ended: RunningCircle) -> list[Worth]:
    """The base, then every policy that was live, in the order of turns."""
    base = await worth_of(client, "base", None, None)
    found = [base]
    for turn in ended.turns:
        if turn.outcome == "promoted" and turn.policy is not None:
            report = await client.report(turn.policy)
            drift = report.kl_policy_base or report.kl_policy_reference
            found.append(await worth_of(client, turn.policy, base.pool, drift))
    return found


def turns_of(ended: RunningCircle) -> tuple[Turn, ...]:
    """With the one that the deadline cut off."""
    return ended.turns if ended.turn is None else (*ended.turns, ended.turn)


def rows_of(worths: Sequence[Worth], turns: Sequence[Turn], n: int) -> list[tuple[str, ...]]:
    """With what the turns aim at, as far as there are draws of the base to tell of it."""
    base = worths[0]
    aims = [k for k in (n ** (i + 1) for i in range(len(turns))) if k <= base.pool.draws // 2]
    of_policy = {one.policy: one.quality for one in worths[1:]}
    return [
        ("the base", *_numbers(base.quality), "–", "–"),
        *((f"(best of {k} of the base)", *_numbers(measure.quality_of_best(base.pool, k)), "–", "–") for k in aims),
        *(_turn_row(turn, of_policy.get(turn.policy or "")) for turn in turns),
    ]


def _turn_row(turn: Turn, quality: measure.Quality | None) -> tuple[str, ...]:
    numbers = ("–",) * 5 if quality is None else _numbers(quality)
    return f"turn {turn.number}, {turn.outcome or turn.phase}", *numbers, f"{turn.seconds:.0f}", _lasted(turn)


def _numbers(quality: measure.Quality) -> tuple[str, ...]:
    return (
        plus_minus(quality.reward),
        plus_minus(quality.gold),
        plus_minus(quality.win_rate, scale=100, digits=1),
        plus_minus(quality.kl_policy_reference),
        plus_minus(quality.tokens, digits=1),
    )


def _lasted(turn: Turn) -> str:
    return "–" if turn.ended_at is None else f"{turn.ended_at - turn.began_at:.0f}"


def gold_steps(worths: Sequence[Worth]) -> list[Interval]:
    """From each live policy to the next, paired by prompt."""
    golds = [one.pool.gold.mean(axis=1) for one in worths]
    return [mean_interval(after - before) for before, after in pairwise(golds)]


def claims_of(ended: RunningCircle, worths: Sequence[Worth], turns: int) -> list[claims.Claim]:
    steps = gold_steps(worths)
    broken = sum(turn.outcome in ("failed", "withdrawn", "stopped") for turn in ended.turns)
    first_to_last = mean_interval(worths[-1].pool.gold.mean(axis=1) - worths[0].pool.gold.mean(axis=1))
    return [
        claims.at_least("turns that came to their end unattended", len(ended.turns), turns),
        claims.at_most("turns whose job, proof or trial broke", broken, 0),
        claims.at_least("turns that were promoted", len(worths) - 1, turns),
        claims.above("gold reward of the last live policy above the base's, lower 95 % bound", first_to_last.low, 0.0),
        claims.at_least("gold reward from one live policy to the next, upper 95 % bound, worst", _worst(steps), 0.0),
        claims.at_most("KL to the base, nats", ended.spent.kl_base, Budgets().max_kl),
    ]


def _worst(steps: Sequence[Interval]) -> float:
    return min((step.high for step in steps), default=float("nan"))


def figures_of(ended: RunningCircle, worths: Sequence[Worth]) -> dict[str, object]:
    return {
        "turns": [turn.model_dump(mode="json") for turn in turns_of(ended)],
        "worth": [{"policy": one.policy, **one.quality.model_dump()} for one in worths],
        "gold_steps": [step.model_dump() for step in gold_steps(worths)],
    }


async def measured(directory: Path, console: Console, turns: int, n: int) -> tuple[RunningCircle, list[Worth]]:
    async with (
        running_stack(prepare(Options(directory=directory, port=0))) as stack,
        open_client(stack.url, api_key=stack.api_key) as client,
    ):
        ended = await unattended(client, console, turns, n)
        return ended, await _worths(client, ended)


def main() -> int:
    parser = claims.arguments(__doc__ or "")
    parser.add_argument("--turns", type=int, default=TURNS, help="how often it goes round")
    parser.add_argument("--n", type=int, default=N, help="of the best-of-n that is served and distilled")
    parser.add_argument("--directory", type=Path, help="keep the stack's state there")
    options = parser.parse_args()
    console = progress.fit(Console(highlight=False))
    with tempfile.TemporaryDirectory(prefix="bonsai-") as directory:
        place = options.directory or Path(directory)
        ended, worths = asyncio.run(measured(place, console, options.turns, options.n))
    rows = rows_of(worths, turns_of(ended), options.n)
    console.print(claims.table(f"{options.turns} turns, n = {options.n}, 95 % intervals", COLUMNS, rows))
    if options.markdown is not None:
        options.markdown.write_text(claims.markdown(COLUMNS, rows))
    return claims.finish(claims_of(ended, worths, options.turns), options.json, figures_of(ended, worths), console)


if __name__ == "__main__":
    sys.exit(main())
