"""Candidates that other policies drew, weighed so that they stand for the reference's draws.

Owns which policies' log-probs that takes, and what follows for each prompt: the reference's log-probs, shares,
reward levels. Does not own the estimators (`bon_algos.importance`) nor opening a policy: it is passed in.

A prompt's draws are taken as draws of the mixture of all policies that drew any of them, so that where the reference
drew some, no weight is large.

Dimension key:  K policies that drew · M candidates of a prompt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bon_algos.acceptance import MIN_PROMPTS
from bon_algos.importance import (
    effective_sample_size,
    levels_of_shares,
    mixture_logprob,
    shares_of_reference,
)
from bon_algos.logprobs import TokenGroup
from bon_algos.serving_order import serving_ranks_of
from bon_algos.steps import SequenceLogprobs
from worker.dataset import FrozenWindow, PromptPool
from worker.errors import JobFailed
from worker.evaluate import logprob_difference
from worker.models import TrainedPolicy

POOLS_AT_ONCE: Final = 64
"""Between two looks at whether the job is to stop."""

CHECKED_CANDIDATES: Final = 8
"""Of a policy, whose logged log-probs are compared with its files'."""

Law = Callable[[str | None], SequenceLogprobs]
"""The log-probs of a policy by its id; None is the reference."""


def sampling_policies(pools: Iterable[PromptPool]) -> list[str]:
    """Ids of all other policies that drew candidates."""
    return sorted({one.policy for pool in pools for one in pool.candidates if one.policy is not None})


def weighed(window: FrozenWindow, law: Law, *, num_candidates: int, check: Callable[[], None]) -> FrozenWindow:
    """The window with every training pool that other policies drew from weighed as the reference's.

    A pool whose candidates are worth fewer than `num_candidates` draws of the reference is left out and counted as
    `too_little_weight`. `check` is called often and may raise. Raises JobFailed when too few pools are left.
    """
    mixed = [pool for pool in window.train if sampling_policies([pool])]
    if not mixed:
        return window
    laws = (None, *sampling_policies(mixed))
    logprobs = {policy: logprobs_of(law(policy), mixed, check) for policy in laws}
    by_pool = {
        id(pool): _with_shares(pool, {policy: rows[b] for policy, rows in logprobs.items()})
        for b, pool in enumerate(mixed)
    }
    train = [by_pool.get(id(pool), pool) for pool in window.train]
    kept = tuple(pool for pool in train if pool.shares is None or effective_sample_size(pool.shares) >= num_candidates)
    if len(kept) < MIN_PROMPTS:
        raise JobFailed(
            "too_few_candidates",
            f"{len(kept)} of {len(train)} prompts have candidates of other policies worth {num_candidates} draws of "
            "the reference: those policies are too far from it, or drew too few",
        )
    lost = sum(pool.num_groups for pool in train) - sum(pool.num_groups for pool in kept)
    rejected = dict(Counter(window.data.rejected) + Counter({"too_little_weight": lost}))
    return window._replace(train=kept, data=window.data.model_copy(update={"rejected": rejected}))


def logprobs_of(
    law: SequenceLogprobs, pools: Sequence[PromptPool], check: Callable[[], None]
) -> list[NDArray[np.float64]]:
    """Of each pool's candidates under one policy; nats."""
    rows: list[NDArray[np.float64]] = []
    for first in range(0, len(pools), POOLS_AT_ONCE):
        check()
        groups = [pool.logged_group.tokens for pool in pools[first : first + POOLS_AT_ONCE]]
        rows += [logprob_M.double().cpu().numpy() for logprob_M in law(groups)]
    return rows


def _with_shares(pool: PromptPool, logprobs: dict[str | None, NDArray[np.float64]]) -> PromptPool:
    drew = Counter(candidate.policy for candidate in pool.candidates)
    sampled_M = mixture_logprob([logprobs[policy] for policy in drew], list(drew.values()))
    share_M = shares_of_reference(logprobs[None], sampled_M)
    level_M2 = levels_of_shares(serving_ranks_of(pool.candidates)[0], share_M)
    update = {
        "reference_logprobs": tuple(logprobs[None].tolist()),
        "shares": tuple(share_M.tolist()),
        "levels": tuple(map(tuple, level_M2.tolist())),
    }
    return pool.model_copy(update=update)


def require_same_sampler(policy: TrainedPolicy, policy_id: str, pools: Sequence[PromptPool], limit: float) -> None:
    """Raises JobFailed when a policy's logged log-probs are not those of its published files."""
    own = ((pool, one) for pool in pools for one in pool.candidates if one.policy == policy_id and one.token_logprobs)
    drawn = list(islice(own, CHECKED_CANDIDATES))
    if not drawn:  # a file does not tell them
        return
    groups = [TokenGroup(pool.prompt_ids, [one.token_ids]) for pool, one in drawn]
    difference = logprob_difference(policy, groups, [[one.token_logprobs] for _, one in drawn], of="policy")
    if not difference <= limit:
        message = f"logged log-probs of {policy_id} differ from its files' by {difference:.2e} nats per token"
        raise JobFailed("train_serve_mismatch", f"{message}; at most {limit:.0e} is rounding")
