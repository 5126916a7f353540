"""Draws of a policy that no engine serves: its own model samples, so that full weights have a report like an adapter's.

Owns how prompts are put together, where a completion ends and what its text is. Does not own the model's forward pass
(transformers) nor the rewards (`rollouts`). Temperature 1 and no truncation, as engines are asked; log-probs are the
trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from bon_algos.chat import ChatTokenizer
from bon_algos.contracts import Candidate, FinishReason
from bon_algos.logprobs import TokenGroup
from worker.dataset import PromptPool
from worker.full_weights import FullPolicy
from worker.models import parts_by_tokens


class Ended(NamedTuple):
    """A completion without what its model would have drawn behind its end."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


def own_draws(
    policy: FullPolicy,
    pools: Sequence[PromptPool],
    n: int,
    tokenizer: ChatTokenizer,
    *,
    seed: int,
    check: Callable[[], None],
) -> list[list[Candidate]]:
    """n candidates of each prompt. `check` is asked between batches and raises when the job must stop."""
    drawn: list[list[Candidate]] = []
    for part in _parts(pools, n):
        check()
        batch, most = pools[part], max(pool.max_tokens for pool in pools[part])
        rows = policy.sampled([pool.prompt_ids for pool in batch], n, most, seed=seed + part.start)
        ended = [
            [_ended(pool, row, policy.end_ids, tokenizer) for row in own] for pool, own in zip(batch, rows, strict=True)
        ]
        drawn += _with_logprobs(policy, batch, ended)
    return drawn


def _with_logprobs(
    policy: FullPolicy, pools: Sequence[PromptPool], ended: Sequence[Sequence[Ended]]
) -> Iterator[list[Candidate]]:
    groups = [
        TokenGroup(pool.prompt_ids, [one.token_ids for one in own]) for pool, own in zip(pools, ended, strict=True)
    ]
    for own, logprobs in zip(ended, policy.token_logprobs(groups, of="policy"), strict=True):
        yield [
            Candidate(**one._asdict(), logprobs=tuple(logprob_L)) for one, logprob_L in zip(own, logprobs, strict=True)
        ]


def _parts(pools: Sequence[PromptPool], n: int) -> Iterator[slice]:
    """As many prompts at once as their rows at their longest have room."""
    return parts_by_tokens([TokenGroup(pool.prompt_ids, [range(pool.max_tokens)] * n) for pool in pools])


def _ended(pool: PromptPool, row: Sequence[int], end_ids: Sequence[int], tokenizer: ChatTokenizer) -> Ended:
    """A completion up to the end of the sequence, to the first of the prompt's stop strings, which is no part of the
    text, or to its length."""
    before = tokenizer.decode(pool.prompt_ids)

    def said(token_ids: Sequence[int]) -> str:
        """Behind the prompt: by themselves some tokenizers' first words lose the space before them."""
        return tokenizer.decode([*pool.prompt_ids, *token_ids]).removeprefix(before)

    row = row[: pool.max_tokens]
    end = next((place for place, token in enumerate(row) if token in end_ids), None)
    body = row if end is None else row[:end]
    for length in range(1, len(body) + 1) if any(stop in said(body) for stop in pool.stop) else ():
        if (text := _cut(said(body[:length]), pool.stop)) is not None:
            return Ended(tuple(body[:length]), text, "stop")
    reason: FinishReason = "length" if end is None else "stop"
    return Ended(tuple(row if end is None else row[: end + 1]), said(body), reason)


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """What stands before the first of the stop strings; None without one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None
