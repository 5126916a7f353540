"""A rank of a job besides the first: `python -m worker.follower RANK SIZE DEVICE MEETING PARENT`.

Owns the loop that makes the calls rank 0 makes, and how their arguments are read. Does not own a lease, an engine, a
file or a decision: it dies with rank 0, and rank 0 with it (`crew`).

Exit 0: rank 0 said the end, or a reason to stop that rank 0 meets at the same step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch.distributed

from bon_algos.logprobs import TokenGroup
from bon_algos.steps import FreshGroup, LoggedGroup, RankedGroup
from worker.errors import Stopped
from worker.lifeline import die_with
from worker.opening import BEGIN, TrainingPlan, open_training, state_of
from worker.ranks import Ranks, join
from worker.train import Training

log = logging.getLogger(__name__)


def _tokens(rows: Sequence[Any]) -> list[TokenGroup]:
    return [TokenGroup(*row) for row in rows]


def _logged(row: Sequence[Any]) -> LoggedGroup:
    return LoggedGroup(TokenGroup(*row[0]), *row[1:])


CALLS: Final[Mapping[str, Callable[..., object]]] = {
    "learn_logged": lambda training, rows: training.learn_logged([_logged(row) for row in rows]),
    "learn_fresh": lambda training, rows: training.learn_fresh([FreshGroup(*row) for row in rows]),
    "learn_ranked": lambda training, rows: training.learn_ranked([RankedGroup(_logged(r[0]), *r[1:]) for r in rows]),
    "finish": lambda training: training.finish(),
    "state": lambda training: training.state({}),
    "factors": lambda training: training.policy.factors,
    "reference_logprobs": lambda training, rows: training.policy.reference_logprobs(_tokens(rows)),
    "sampled": lambda training, prompts, n, most, seed: training.policy.sampled(prompts, n, most, seed=seed),
    "sequence_features": lambda training, sequences: training.policy.sequence_features(sequences),
    "base_logprobs": lambda training, rows: training.policy.base_logprobs(_tokens(rows)),
    "token_logprobs": lambda training, rows, of: training.policy.token_logprobs(_tokens(rows), of=of),
}


def follow(ranks: Ranks) -> None:
    """Make the calls that rank 0 makes, until it says the end. The first begins a training."""
    training: Training | None = None
    while (message := ranks.hear()) is not None:
        name, args, kwargs = message
        if name == BEGIN:
            plan = TrainingPlan.model_validate(*args)
            training = open_training(plan, state_of(plan), ranks)
        else:
            CALLS[name](training, *args, **kwargs)


def main(rank: int, size: int, device_type: str, meeting: Path, parent: int) -> int:
    die_with(parent)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s rank {rank} %(name)s %(message)s")
    ranks = join(rank, size, device_type, meeting)
    try:
        follow(ranks)
    except Stopped as reason:
        log.info("stopped with rank 0: %s", reason)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])))
