"""Held-out prompts with draws of laws that can be enumerated: each outcome is a text, its reward and its tokens.

Stands where an engine and a reward model were asked; what is made of the draws is the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bon_algos.contracts import Interval
from bon_algos.order import mean_interval
from tests.worker import world
from worker.dataset import LoggedCandidate, PromptPool
from worker.evaluate import Judged, report_of
from worker.judge import NOT_CONFIGURED, NoOpinion, Opinion
from worker.report import Evidence, Subject
from worker.rollouts import Rollout


def rollout(reward, *, tokens=2, text="It is a word.", finish_reason="stop", logprob=-1.0):
    drawn = world.candidate(
        (5,) * (tokens - 1) + (world.END,) if tokens else (),
        (logprob,) * tokens,
        reward,
        text,
        finish_reason,
    )
    return Rollout(drawn, reward)


def pool(number, logged=()):
    return PromptPool(
        prompt_ids=(0, number),
        prompt=f"w0 w{number}",
        messages=None,
        max_tokens=world.MAX_TOKENS,
        stop=(),
        num_groups=1,
        side="held_out",
        candidates=tuple(
            LoggedCandidate(token_ids=(5, world.END), token_logprobs=(-1.0, -1.0), reward=reward, ranking_reward=reward)
            for reward in logged
        ),
    )


def row(number, policy: Sequence[object], reference: Sequence[object], logged: Sequence[float] = ()):
    """Of rewards, or of rollouts as they are."""
    own, other = ([one if isinstance(one, Rollout) else rollout(one) for one in side] for side in (policy, reference))
    about = pool(number, logged)
    return Judged(about, own, other, about.drawn_by_reference)


def categorical(rng: np.random.Generator, rewards, policy_law, reference_law, *, prompts, draws, logged=0):
    """The same two laws for every prompt."""
    return [
        row(
            number,
            rng.choice(rewards, draws, p=policy_law).tolist(),
            rng.choice(rewards, draws, p=reference_law).tolist(),
            rng.choice(rewards, logged, p=reference_law).tolist(),
        )
        for number in range(prompts)
    ]


def evidence(judged, n, *, kl=None, opinion: Opinion | NoOpinion | None = None):
    kl_of_prompts = kl if kl is not None else [0.5 + 0.01 * i for i in range(len(judged))]
    summary = report_of(judged, mean_interval(kl_of_prompts), n)
    return Evidence(judged, kl_of_prompts, summary, opinion or NoOpinion(NOT_CONFIGURED))


def subject(n, **fields):
    values = {
        "policy_id": "pol-" + "1" * 16,
        "kind": "lora",
        "base_policy_id": world.BASE,
        "parent_policy_id": world.BASE,
        "reference_policy_id": world.BASE,
        "job_id": "job_1",
        "route": "default",
        "method": "bond",
        "created_at": 1000.0,
        "seed": 3,
        "n": n,
        "reward_model_id": world.REWARD_MODEL,
        "reward_members": 1,
    }
    return Subject(**(values | fields))


def holds(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high
