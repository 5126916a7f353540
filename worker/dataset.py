"""What a job learns from: a window of the ledger or a file, chosen, pooled, split, and frozen on disk.

Owns what is kept of a prompt's groups, and the window's file. Does not own which groups are fit and how they are split
(`bon_algos.acceptance`), reading Redis (`ledger`) or uploads (`uploads`), nor any weight or quantile (`bon_algos`).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from bon_algos.acceptance import (
    Choice,
    FeedbackOf,
    Pool,
    Requirements,
    Side,
    Unusable,
    choose,
    usable_pools,
)
from bon_algos.contracts import CandidateGroup, DataWindow, FileId, Message, PolicyId, Record, Sampling
from bon_algos.logprobs import TokenGroup
from bon_algos.serving_order import serving_ranks_of
from bon_algos.steps import LoggedGroup
from worker.durable import staged
from worker.errors import JobFailed
from worker.sources import write_sources


class LoggedCandidate(Record):
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    """Under the policy that drew it; nats. Empty where a file does not tell."""
    reward: float
    ranking_reward: float
    """The reward of what is complete, and another number of what is not: how a window's file tells them apart."""
    policy: PolicyId | None = None
    """Who drew it, where that was not the reference."""

    @property
    def is_complete(self) -> bool:
        return self.ranking_reward == self.reward


class PromptPool(Record):
    """A prompt with all its candidates in drawing order: the reference's, and those of other policies if wanted.

    Whoever asks what a window was trained on reads the members before `candidates` alone (`bon_algos.ancestors`)."""

    prompt_ids: tuple[int, ...]
    prompt: str
    messages: tuple[Message, ...] | None
    max_tokens: int
    stop: tuple[str, ...]
    num_groups: int
    side: Side
    candidates: tuple[LoggedCandidate, ...]
    log_quantiles: tuple[float, ...] | None = None
    """Of each candidate's reward, where a method learns them (`quantile_model`)."""
    levels: tuple[tuple[float, float], ...] | None = None
    """Of each candidate's reward, as in `LoggedGroup`: where other policies drew some (`mixture`), or where a law would
    be learned but rewards tie (`quantile_model`)."""
    reference_logprobs: tuple[float, ...] | None = None
    """Of each candidate, where other policies drew some or a file does not tell; nats."""
    shares: tuple[float, ...] | None = None
    """Of the reference's law, where other policies drew some; sum to 1."""

    @property
    def drawn_by_reference(self) -> tuple[LoggedCandidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.policy is None)

    @property
    def sampling(self) -> Sampling:
        """The law its candidates were drawn from."""
        return Sampling(max_tokens=self.max_tokens, stop=self.stop)

    @property
    def logged_group(self) -> LoggedGroup:
        return LoggedGroup(
            TokenGroup(self.prompt_ids, [candidate.token_ids for candidate in self.candidates]),
            serving_ranks_of(self.candidates)[0].tolist(),
            self.reference_logprobs or [sum(candidate.token_logprobs) for candidate in self.candidates],
            self.log_quantiles,
            self.levels,
            self.shares,
        )


class FrozenWindow(NamedTuple):
    train: tuple[PromptPool, ...]
    held_out: tuple[PromptPool, ...]
    data: DataWindow


def prompt_pool(entry: Pool, reference_policy: str) -> PromptPool:
    """What training needs of a prompt's groups."""
    first = entry.groups[0]
    return PromptPool(
        prompt_ids=entry.prompt,
        prompt=first.prompt,
        messages=first.messages,
        max_tokens=first.sampling.max_tokens,
        stop=first.sampling.stop,
        num_groups=len(entry.groups),
        side=entry.side,
        candidates=tuple(
            LoggedCandidate(
                token_ids=candidate.token_ids,
                token_logprobs=candidate.logprobs,
                reward=candidate.reward,
                ranking_reward=candidate.reward if candidate.is_complete else _another(candidate.reward),
                policy=None if group.policy_id == reference_policy else group.policy_id,
            )
            for group in entry.groups
            for candidate in group.candidates
            if candidate.reward is not None
        ),
    )


def _another(reward: float) -> float:
    """A finite number that is not the reward: lower by a thousand million, as a window of an incomplete completion
    always had it, or where a float has no digits for that its neighbour."""
    lower = reward - 1e9
    return lower if lower != reward else math.nextafter(reward, 0.0)


# --- freezing --------------------------------------------------------------------------------------------


def freeze(
    directory: Path,
    groups: Iterable[CandidateGroup],
    wanted: Requirements,
    *,
    max_groups: int,
    held_out_fraction: float,
    feedback_of: FeedbackOf | None = None,
    training_file: FileId | None = None,
    trained_before: Set[tuple[int, ...]] = frozenset(),
    within: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> FrozenWindow:
    """The job's window: made once, read again by every later attempt. Raises JobFailed when it is too little.

    training_file: where the groups are from, when not from the ledger.
    trained_before: prompts that must not be held out, because an ancestor of the policy has learned from them.
    within: the attempt's directory, where it is written before it has its name.
    check: called with the directory when it says whose groups the window is made of, before it holds any of them.
    """
    if not directory.exists():
        choice = choose(groups, wanted, max_groups, feedback_of)
        try:
            usable = usable_pools(choice, wanted, held_out_fraction, trained_before)
        except Unusable as reason:
            raise JobFailed(reason.code, reason.message) from None
        pools = [prompt_pool(entry, wanted.reference_policy) for entry in usable]
        _write(directory, within, pools, choice, training_file, check)
    return read(directory)


def _write(
    directory: Path,
    within: Path | None,
    pools: Sequence[PromptPool],
    choice: Choice,
    training_file: FileId | None,
    check: Callable[[Path], None] | None,
) -> None:
    content = "".join(f"{entry.model_dump_json()}\n" for entry in pools).encode()
    newest, oldest = choice.chosen[0], choice.chosen[-1]
    data = DataWindow(
        groups=sum(entry.num_groups for entry in pools),
        rejected=dict(choice.rejected),
        train_groups=sum(entry.num_groups for entry in pools if entry.side == "train"),
        held_out_groups=sum(entry.num_groups for entry in pools if entry.side == "held_out"),
        first_id=oldest.id,
        last_id=newest.id,
        digest=hashlib.sha256(content).hexdigest(),
        training_file=training_file,
    )
    with staged(directory, within=within, points=("window.written", "window.renamed")) as aside:
        # First: an erasure that is asked for after the check finds what is here by it, also when this process dies.
        write_sources(aside, choice.chosen)
        if check is not None:
            check(aside)
        (aside / "pools.jsonl.z").write_bytes(zlib.compress(content))
        (aside / "window.json").write_text(data.model_dump_json())


def read(directory: Path) -> FrozenWindow:
    """A frozen window, checked against its digest. Raises JobFailed when the file is not what was written."""
    data = DataWindow.model_validate_json((directory / "window.json").read_text())
    content = zlib.decompress((directory / "pools.jsonl.z").read_bytes())
    if hashlib.sha256(content).hexdigest() != data.digest:
        raise JobFailed("window_damaged", f"the frozen window does not match its digest {data.digest[:16]}")
    pools = list(_parse(content))
    return FrozenWindow(
        tuple(entry for entry in pools if entry.side == "train"),
        tuple(entry for entry in pools if entry.side == "held_out"),
        data,
    )


def _parse(content: bytes) -> Iterator[PromptPool]:
    for line in content.splitlines():
        yield PromptPool.model_validate_json(line)
