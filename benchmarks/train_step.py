"""One training step on a group of candidates: shared prompts against separate rows, and against trl's trainers.

Everybody gets the same model, data, optimiser and one thread (`training_peers`). trl's head is compacted to completion
positions, as it is on CUDA; stock, it projects every position on a CPU. The steps take turns in an order that is drawn
anew every round; a ratio is process CPU time against process CPU time within a round, which ignores what other
processes take, and its interval is over rounds. Memory is what a step needs at its peak beyond weights, gradients and
the optimiser's state, each in a process of its own.

    python -m benchmarks.train_step            # 12 rounds of the main group, 6 to 48 of every other shape: 35 minutes
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.claims import Claim, arguments, at_least, at_most, finish, markdown, table
from benchmarks.training_peers import NAMES, STEPS, Shape, quiet, random_data, random_llama
from bon_algos.contracts import Interval
from bon_algos.order import mean_interval

MAIN = Shape(prompt=256, completion=64, candidates=16, vocabulary=4096)
GRID = (
    *(Shape(256, 64, candidates, 4096) for candidates in (2, 4, 64)),
    *(Shape(prompt, completion, 2, 4096) for prompt, completion in ((16, 256), (64, 256), (256, 256), (1024, 64))),
    *(Shape(prompt, completion, 16, 4096) for prompt, completion in ((16, 256), (64, 64), (1024, 64))),
    *(Shape(*sizes, 131_072) for sizes in ((256, 64, 2), (16, 256, 4), (1024, 64, 8), (256, 64, 16))),
)
MEMORY_STEPS = ("naive", "separate", "shared")
GRID_STEPS = ("grpo", "shared")
PEER_BYTES = 12 * 2**30
"""A peer's step that would hold more than this of numbers over the vocabulary is not tried."""

Rounds = Sequence[Mapping[str, float]]
"""Of each round, the CPU seconds of each step."""


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="of the main group (12); others get half or more")
    options = parser.parse_args()
    console = Console()
    quiet()
    with Progress(console=console, transient=True) as progress:
        main_task = progress.add_task("the main group", total=options.rounds)
        rounds = measured(MAIN, tuple(STEPS), options.rounds, lambda: progress.advance(main_task))
        memory = {}
        for name in progress.track(MEMORY_STEPS, description="memory"):
            memory[name] = _in_a_process_of_its_own(name)
        grid = {}
        for shape in progress.track(GRID, description="other shapes"):
            grid[shape] = measured(shape, GRID_STEPS, rounds_of(shape, options.rounds)) if peer_fits(shape) else []
    claims = report(rounds, memory, grid, options.markdown, console)
    figures = {
        "cpu_seconds": list(map(dict, rounds)),
        "peak_bytes": memory,
        "shapes": [{**shape._asdict(), "cpu_seconds": list(map(dict, found))} for shape, found in grid.items()],
    }
    return finish(claims, options.json, figures, console)


def measured(
    shape: Shape, names: Sequence[str], num_rounds: int, after_round: Callable[[], None] = lambda: None
) -> Rounds:
    """CPU seconds of the steps, which take turns; one round before them warms up and does not count."""
    shuffle = random.Random(0).shuffle
    with random_llama(shape.vocabulary) as directory:
        steps = {name: STEPS[name](directory, random_data(shape)) for name in names}
        rounds: list[dict[str, float]] = []
        for _ in range(num_rounds + 1):
            order = list(steps)
            shuffle(order)
            rounds.append({})
            for name in order:
                start = time.process_time()
                steps[name]()
                rounds[-1][name] = time.process_time() - start
            after_round()
    return rounds[1:]


def ratio(rounds: Rounds, base: str, name: str) -> Interval:
    """How many times faster `name` is than `base`: geometric mean over rounds, 95 % interval."""
    mean, low, high = mean_interval([math.log(one[base] / one[name]) for one in rounds]).model_dump().values()
    return Interval(mean=math.exp(mean), low=math.exp(low), high=math.exp(high))


def rounds_of(shape: Shape, main_rounds: int) -> int:
    """Half of the main group's, and up to eight times as many of a small shape, whose time is noise sooner."""
    cheaper = _separate_tokens(MAIN) / _separate_tokens(shape)
    return max(3, round(main_rounds / 2 * min(8.0, max(1.0, cheaper))))


def peer_fits(shape: Shape) -> bool:
    """trl's head holds several numbers for each completion token and word where nothing tiles it: on a CPU."""
    return shape.completion * shape.candidates * shape.vocabulary * 4 * 4 <= PEER_BYTES


# --- memory ----------------------------------------------------------------------------------------------


def _in_a_process_of_its_own(name: str) -> int:
    # Whatever is larger than this goes back to the system when it is freed, so that a peak is a peak of use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_bytes, (name,))


def peak_bytes(name: str) -> int:
    """Most resident bytes during a step, less those before it. Linux."""
    quiet()
    with random_llama(MAIN.vocabulary) as directory:
        step = STEPS[name](directory, random_data(MAIN))
        step()  # gradients and the optimiser's state exist from here on
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
        step()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"the kernel does not tell {field}"
    return int(found[1]) * 1024


# --- the report ------------------------------------------------------------------------------------------


def report(
    rounds: Rounds,
    memory: Mapping[str, int],
    grid: Mapping[Shape, Rounds],
    markdown_file: Path | None,
    console: Console,
) -> list[Claim]:
    """Print and write the tables; what they claim."""
    columns = ("step", "CPU ms", "× GRPO", "× DPO", "peak MiB")
    rows = [
        (
            NAMES[name],
            f"{1000 * np.median([one[name] for one in rounds]):.0f}",
            _times(ratio(rounds, "grpo", name)),
            _times(ratio(rounds, "dpo", name)),
            f"{memory[name] / 2**20:.0f}" if name in memory else "",
        )
        for name in STEPS
    ]
    grid_columns = ("prompt + completion × candidates, vocabulary", "tokens shared", "× GRPO")
    grid_rows = [
        (
            f"{shape.prompt} + {shape.completion} × {shape.candidates}, {shape.vocabulary}",
            f"{_token_ratio(shape):.2f}",
            _times(ratio(found, "grpo", "shared")) if found else "the peer does not fit",
        )
        for shape, found in grid.items()
    ]
    group = f"One group: {MAIN.prompt} + {MAIN.completion} × {MAIN.candidates}, vocabulary {MAIN.vocabulary}"
    console.print(table(group, columns, rows))
    console.print(table("Other shapes, with a reference pass", grid_columns, grid_rows))
    if markdown_file is not None:
        markdown_file.write_text(markdown(columns, rows) + "\n" + markdown(grid_columns, grid_rows))
    worst = min(ratio(found, "grpo", "shared").low for found in grid.values() if found)
    return [
        at_least("times GRPO with a reference pass (lower bound)", ratio(rounds, "grpo", "shared").low, 3.0),
        at_least(
            "times GRPO, reference from the ledger (lower bound)", ratio(rounds, "grpo", "shared_logged").low, 4.0
        ),
        at_most("share of the memory of rows with all logits", memory["shared"] / memory["naive"], 0.3),
        at_least("times GRPO in the worst shape (lower bound)", worst, 0.97),
    ]


def _times(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f}–{interval.high:.2f})"


def _token_ratio(shape: Shape) -> float:
    """Tokens of separate rows for one token of the shared row."""
    return _separate_tokens(shape) / (shape.prompt + shape.candidates * shape.completion)


def _separate_tokens(shape: Shape) -> int:
    return shape.candidates * (shape.prompt + shape.completion)


if __name__ == "__main__":
    sys.exit(main())
