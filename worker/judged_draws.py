"""What a report is drawn from: fresh samples of the policy and of its reference, on the same prompts.

Owns who serves which side. Does not own: rollouts themselves (`rollouts`, `own_draws`), what is made of them
(`evaluate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from worker.dataset import PromptPool
from worker.evaluate import Judged
from worker.full_weights import FullPolicy
from worker.job_process import read_tokenizer
from worker.models import TrainedPolicy
from worker.own_draws import own_draws
from worker.rollouts import Rollout, Rollouts

Sides = tuple[Sequence[Sequence[Rollout]], Sequence[Sequence[Rollout]]]
"""The policy's draws of each prompt, and the reference's."""


class Drawing(NamedTuple):
    """What samples are drawn with."""

    rollouts: Rollouts
    base_policy_id: str
    policy_directory: Path
    seed: int
    """Of full weights' own samples."""
    check: Callable[[], None]
    """Raises when the attempt is over."""


def draw_judged(
    policy: TrainedPolicy, pools: Sequence[PromptPool], num_samples: int, drawing: Drawing, *, has_all_draws: bool
) -> list[Judged]:
    """Each prompt with `num_samples` of either side, and with the window's of the reference where it `has_all_draws`:
    there these are of the reference's law. Raises EngineUnavailable."""
    if isinstance(policy, FullPolicy):
        own, reference = _by_itself(policy, pools, num_samples, drawing)
    else:
        own, reference = _by_the_engine(policy, pools, num_samples, drawing)
    logged = [pool.drawn_by_reference if has_all_draws else () for pool in pools]
    return [Judged(*row) for row in zip(pools, own, reference, logged, strict=True)]


def _by_the_engine(policy: TrainedPolicy, pools: Sequence[PromptPool], num_samples: int, drawing: Drawing) -> Sides:
    rollouts = drawing.rollouts
    with rollouts.served(policy) as name, _reference_served(policy, drawing) as reference:
        drawn = rollouts.draw([(model, pool, num_samples) for model in (name, reference) for pool in pools])
    return drawn[: len(pools)], drawn[len(pools) :]


@contextmanager
def _reference_served(policy: TrainedPolicy, drawing: Drawing) -> Iterator[str]:
    """The name under which the engine serves the reference. A published one is lent once more: what engines hold for
    routes may change meanwhile."""
    if policy.start is None:
        yield drawing.base_policy_id
    else:
        with drawing.rollouts.served(policy, policy.start) as name:
            yield name


def _by_itself(policy: FullPolicy, pools: Sequence[PromptPool], num_samples: int, drawing: Drawing) -> Sides:
    """No engine serves it: it draws for itself, its reference from the engine."""
    tokenizer = read_tokenizer(drawing.policy_directory)
    drawn = own_draws(policy, pools, num_samples, tokenizer, seed=drawing.seed, check=drawing.check)
    own = drawing.rollouts.scored(pools, drawn)
    return own, drawing.rollouts.draw([(drawing.base_policy_id, pool, num_samples) for pool in pools])
