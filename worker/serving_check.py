"""Whether the model that is trained is the one that is served.

Owns the comparison of logged log-probs with the trainer's own of the reference. Does not own that of other policies
(`mixture`), nor that of what was trained (`evaluate`).
"""

from __future__ import annotations

from collections.abc import Sequence

from bon_algos.logprobs import TokenGroup
from worker.dataset import PromptPool
from worker.errors import JobFailed
from worker.evaluate import logprob_difference
from worker.models import TrainedPolicy
from worker.rollouts import spread

SERVING_CHECK_PROMPTS = 8
MAX_SERVING_DIFFERENCE = 1e-2
"""Nats per token, mean, between logged log-probs of the reference and the trainer's: more is another model."""


def require_same_reference(policy: TrainedPolicy, pools: Sequence[PromptPool]) -> None:
    """Compare some logged log-probs with the trainer's own of the reference, once.

    Raises JobFailed when they are another model's: weights, tokenizer or precision differ between serving and
    training, and nothing that is learned would be what is served.
    """
    drawn = [(pool, one) for pool in spread(pools, SERVING_CHECK_PROMPTS) for one in pool.drawn_by_reference[:1]]
    checked = [(pool, one) for pool, one in drawn if one.token_logprobs]
    if not checked:  # a file does not tell, or others drew everything, and `require_same_sampler` looks at those
        return
    groups = [TokenGroup(pool.prompt_ids, [one.token_ids]) for pool, one in checked]
    seen = [[one.token_logprobs] for _, one in checked]
    difference = logprob_difference(policy, groups, seen, of="reference")
    if not difference <= MAX_SERVING_DIFFERENCE:
        message = f"logged log-probs differ from the trainer's by {difference:.2e} nats per token"
        raise JobFailed("train_serve_mismatch", f"{message}; at most {MAX_SERVING_DIFFERENCE:.0e} is rounding")
