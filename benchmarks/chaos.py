"""Jobs under random faults: each ends once and with the policy it would have had, and training goes on soon.

    python -m benchmarks.chaos [--jobs N] [--workers W] [--seed S] [--json FILE]

Real Redis, real Celery workers over TCP, real training of a random Llama; the engine is the tests' stub, which really
samples it. Every second something happens: kill -9 of a worker, of its child or of its training process, a worker or
its training frozen past the lease, all connections reset, all connections silent, kill -9 of Redis, a message
delivered again. Then, in peace, the link to the broker goes half open once more, to be timed.

Owns the order of things, the claims and the table. Does not own the faults (`benchmarks.chaos_world`). A job that has
died twice is not killed again: the third death would end it by design (`dead_letter`).
"""

from __future__ import annotations

import sys
import time
from collections import Counter

from rich.console import Console

from benchmarks.chaos_world import ChaosWorld, chaos_world
from benchmarks.claims import arguments, at_least, at_most, finish, table

SECONDS_PER_JOB = 90.0


def endure(world: ChaosWorld, jobs: int, pause_seconds: float = 1.0) -> None:
    """Submit the jobs and let things happen until all have ended, or the time for it is over."""
    world.submit(jobs)
    give_up_at = time.monotonic() + 60 + SECONDS_PER_JOB * jobs
    while world.open_jobs() and time.monotonic() < give_up_at:
        world.let_something_happen()
        world.watch(pause_seconds)
    world.thaw()


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with chaos_world(options.seed, options.workers) as world:
        world.learn_the_right_policy()
        endure(world, options.jobs)
        half_open = world.half_open_seconds()
        right, recoveries, faults = world.right_jobs(), sorted(world.recoveries), Counter(world.faults)
        strangers = world.strangers()
    rows = [(name, str(count)) for name, count in sorted(faults.items())]
    console = Console()
    console.print(table(f"{sum(faults.values())} faults, seed {options.seed}", ("fault", "times"), rows))
    slowest = recoveries[-1] if recoveries else float("nan")
    claims = [
        at_least(f"of {options.jobs} jobs, ended once and with the right policy", right, options.jobs),
        at_most("policies that nobody should have made", strangers, 0),
        at_most("seconds from a kill to training again, the slowest", slowest, 90),
        at_most("seconds until a worker on a half-open link consumes again", half_open, 90),
    ]
    figures = {"faults": dict(faults), "recovery_seconds": recoveries, "half_open_seconds": half_open}
    return finish(claims, options.json, figures, console)


if __name__ == "__main__":
    sys.exit(main())
