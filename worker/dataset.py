"""What a job learns from: a window of the ledger, chosen, pooled, split, and frozen on disk.

Owns which groups are fit, the pooling of one prompt's groups, the split into train and held-out, and the file.
Does not own reading Redis (`ledger`) nor any weight or quantile (`bon_algos`).

Groups of one prompt under one law are independent draws of who drew them, so they are pooled: weights and
quantiles of a prompt use all of its candidates. Which side a prompt is on depends on its tokens and its
sessions alone: prompts that share a session, directly or through others, stay together.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Final, Literal, NamedTuple

from bon_algos.contracts import Candidate, CandidateGroup, DataWindow, Message, PolicyId, Record, Sampling
from bon_algos.logprobs import TokenGroup
from bon_algos.steps import LoggedGroup
from worker.durable import staged
from worker.errors import JobFailed
from worker.sources import write_sources

INCOMPLETE_PENALTY: Final = 1e9
"""Taken off the reward of a truncated or empty completion for ranking: such a one is served only when there is
no complete one, so below all complete ones is its place. Ranks are all that is used of it."""

MIN_PROMPTS: Final = 2
"""On either side: a baseline and an interval need another prompt."""

Side = Literal["train", "held_out"]


class LoggedCandidate(Record):
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    """Under the policy that drew it; nats."""
    reward: float
    ranking_reward: float
    policy: PolicyId | None = None
    """Who drew it, where that was not the reference."""


class PromptPool(Record):
    """A prompt with all its candidates in drawing order: the reference's, and those of other policies if wanted."""

    prompt_ids: tuple[int, ...]
    prompt: str
    messages: tuple[Message, ...] | None
    max_tokens: int
    stop: tuple[str, ...]
    num_groups: int
    side: Side
    candidates: tuple[LoggedCandidate, ...]
    log_quantiles: tuple[float, ...] | None = None
    """Of each candidate's reward, where a method learns them (`quantile_model`) or other policies drew some
    (`mixture`)."""
    reference_logprobs: tuple[float, ...] | None = None
    """Of each candidate, where other policies drew some; nats."""
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
            [candidate.ranking_reward for candidate in self.candidates],
            self.reference_logprobs or [sum(candidate.token_logprobs) for candidate in self.candidates],
            self.log_quantiles,
            self.shares,
        )


class FrozenWindow(NamedTuple):
    train: tuple[PromptPool, ...]
    held_out: tuple[PromptPool, ...]
    data: DataWindow


class Requirements(NamedTuple):
    """What a group must be for this job."""

    reference_policy: str
    reward_model: str
    reward_template_digest: str
    num_candidates: int
    """Of a prompt's pool."""
    since: float | None = None
    until: float | None = None
    other_policies: tuple[str, ...] = ()


def ranking_reward(candidate: Candidate, reward: float) -> float:
    """The number that orders candidates as they are served."""
    return reward if candidate.is_complete else reward - INCOMPLETE_PENALTY


# --- choosing --------------------------------------------------------------------------------------------


def rejection(group: CandidateGroup, wanted: Requirements) -> str | None:
    """Why a group cannot be learned from; None when it can."""
    if wanted.until is not None and group.created_at > wanted.until:
        return "too_new"
    if wanted.since is not None and group.created_at < wanted.since:
        return "too_old"
    if not group.store:
        return "not_stored"
    if group.policy_id not in (wanted.reference_policy, *wanted.other_policies):
        return "other_policy"
    if group.reward_model_id != wanted.reward_model:
        return "other_reward_model"
    if group.reward_template_digest != wanted.reward_template_digest:
        return "other_reward_template"
    if not group.sampling.is_policy_law:
        return "changed_law"
    if not group.is_fixed:
        return "not_fixed"
    if not group.is_unbiased or any(not candidate.token_ids for candidate in group.candidates):
        return "incomplete"
    return None


def choose(
    groups: Iterable[CandidateGroup], wanted: Requirements, max_groups: int
) -> tuple[list[CandidateGroup], Counter[str]]:
    """The first `max_groups` that fit, in the order given, and how many did not, by reason."""
    chosen: list[CandidateGroup] = []
    rejected: Counter[str] = Counter()
    seeds: set[tuple[str, tuple[int, ...], int]] = set()
    for group in groups:
        reason = rejection(group, wanted)
        if reason is None and group.sampling.seed is not None:
            # The engine repeats itself for a repeated seed: the second group is no second draw.
            seed = (group.policy_id, group.prompt_token_ids, group.sampling.seed)
            reason = "repeated_seed" if seed in seeds else None
            seeds.add(seed)
        if reason is not None:
            rejected[reason] += 1
            continue
        chosen.append(group)
        if len(chosen) == max_groups:
            break
    return chosen, rejected


# --- pooling and splitting -------------------------------------------------------------------------------


def split_sides(
    groups: Sequence[CandidateGroup], held_out_fraction: float, trained_before: Set[tuple[int, ...]] = frozenset()
) -> dict[tuple[int, ...], Side]:
    """The side of every prompt, by a hash of the prompts and sessions it is linked with.

    A family is what shares a prompt or a session, directly or through others. Families whose hash falls below
    the fraction are held out, and the lowest ones in any case until there are `MIN_PROMPTS`, so that a small
    window can be evaluated. A family with a prompt of `trained_before`, which an ancestor of the policy has learned
    from, is never held out. ValueError when no split leaves `MIN_PROMPTS` on either side.
    """
    families = sorted((_family_hash(family), sorted(family)) for family in _families(groups))
    sides: dict[tuple[int, ...], Side] = {}
    num_held_out = 0
    for share, family in families:
        is_low = share < held_out_fraction or num_held_out < MIN_PROMPTS
        side: Side = "held_out" if is_low and trained_before.isdisjoint(family) else "train"
        sides.update(dict.fromkeys(family, side))
        num_held_out += len(family) if side == "held_out" else 0
    num_train = len(sides) - num_held_out
    if num_train < MIN_PROMPTS or num_held_out < MIN_PROMPTS:
        known = (
            f", {num_known} of them known to an ancestor" if (num_known := len(trained_before & sides.keys())) else ""
        )
        split = f"split into {num_train} and {num_held_out}"
        raise ValueError(f"{len(sides)} prompts{known} in {len(families)} families {split}")
    return sides


def _families(groups: Sequence[CandidateGroup]) -> list[set[tuple[int, ...]]]:
    """Prompts joined by the sessions they occurred in."""
    parent: dict[tuple[int, ...] | str, tuple[int, ...] | str] = {}

    def root(node: tuple[int, ...] | str) -> tuple[int, ...] | str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for group in groups:
        prompt = root(group.prompt_token_ids)
        if group.session is not None:
            parent[root(group.session)] = prompt
    members: dict[tuple[int, ...] | str, set[tuple[int, ...]]] = {}
    for prompt_ids in {group.prompt_token_ids for group in groups}:
        members.setdefault(root(prompt_ids), set()).add(prompt_ids)
    return list(members.values())


def _family_hash(family: set[tuple[int, ...]]) -> float:
    """In [0, 1): where the family's first prompt falls, the same in every window that contains it."""
    first = json.dumps(min(family)).encode()
    return int.from_bytes(hashlib.blake2b(first, digest_size=8).digest()) / 2**64


def pool(
    groups: Sequence[CandidateGroup], sides: dict[tuple[int, ...], Side], reference_policy: str
) -> list[PromptPool]:
    """One pool for each prompt and length limit, ordered by its tokens; candidates oldest group first."""
    by_law: dict[tuple[tuple[int, ...], int, tuple[str, ...]], list[CandidateGroup]] = {}
    for group in sorted(groups, key=lambda group: (group.created_at, group.id)):
        key = (group.prompt_token_ids, group.sampling.max_tokens, group.sampling.stop)
        by_law.setdefault(key, []).append(group)
    return [_pool_of(by_law[key], sides[key[0]], reference_policy) for key in sorted(by_law)]


def _pool_of(groups: Sequence[CandidateGroup], side: Side, reference_policy: str) -> PromptPool:
    first = groups[0]
    return PromptPool(
        prompt_ids=first.prompt_token_ids,
        prompt=first.prompt,
        messages=first.messages,
        max_tokens=first.sampling.max_tokens,
        stop=first.sampling.stop,
        num_groups=len(groups),
        side=side,
        candidates=tuple(
            LoggedCandidate(
                token_ids=candidate.token_ids,
                token_logprobs=candidate.logprobs,
                reward=candidate.reward,
                ranking_reward=ranking_reward(candidate, candidate.reward),
                policy=None if group.policy_id == reference_policy else group.policy_id,
            )
            for group in groups
            for candidate in group.candidates
            if candidate.reward is not None
        ),
    )


# --- freezing --------------------------------------------------------------------------------------------


def freeze(
    directory: Path,
    groups: Iterable[CandidateGroup],
    wanted: Requirements,
    *,
    max_groups: int,
    held_out_fraction: float,
    trained_before: Set[tuple[int, ...]] = frozenset(),
    within: Path | None = None,
) -> FrozenWindow:
    """The job's window: made once, read again by every later attempt. Raises JobFailed when it is too little.

    trained_before: prompts that must not be held out, because an ancestor of the policy has learned from them.
    within: the attempt's directory, where it is written before it has its name.
    """
    if not directory.exists():
        chosen, rejected = choose(groups, wanted, max_groups)
        pools, num_small = _usable_pools(chosen, wanted, rejected, held_out_fraction, trained_before)
        rejected.update({"too_few_candidates": num_small} if num_small else {})
        _write(directory, within, pools, chosen, rejected)
    return read(directory)


def _usable_pools(
    chosen: Sequence[CandidateGroup],
    wanted: Requirements,
    rejected: Counter[str],
    held_out_fraction: float,
    trained_before: Set[tuple[int, ...]],
) -> tuple[list[PromptPool], int]:
    read = f"{len(chosen)} usable groups of the window, rejected {dict(rejected)}"
    if not chosen:
        raise JobFailed("empty_window", read)
    try:
        sides = split_sides(chosen, held_out_fraction, trained_before)
    except ValueError as error:
        raise JobFailed("too_few_prompts", f"{error}; each side needs {MIN_PROMPTS}; {read}") from None
    pools = pool(chosen, sides, wanted.reference_policy)
    usable = [entry for entry in pools if len(entry.candidates) >= wanted.num_candidates]
    largest = max(len(entry.candidates) for entry in pools)
    for side in ("train", "held_out"):
        if sum(entry.side == side for entry in usable) < MIN_PROMPTS:
            message = f"best-of-{wanted.num_candidates} needs that many candidates of a prompt; the largest of "
            raise JobFailed("too_few_candidates", f"{message}{len(pools)} prompts has {largest}; {read}")
    rewards = [[candidate.ranking_reward for candidate in entry.candidates] for entry in usable]
    if all(len(set(row)) == 1 for row in rewards) and any(len(row) > 1 for row in rewards):
        raise JobFailed("rewards_all_equal", f"no prompt of {len(usable)} has two different rewards; {read}")
    return usable, sum(entry.num_groups for entry in pools) - sum(entry.num_groups for entry in usable)


def _write(
    directory: Path,
    within: Path | None,
    pools: Sequence[PromptPool],
    chosen: Sequence[CandidateGroup],
    rejected: Counter[str],
) -> None:
    content = "".join(f"{entry.model_dump_json()}\n" for entry in pools).encode()
    newest, oldest = chosen[0], chosen[-1]
    data = DataWindow(
        groups=sum(entry.num_groups for entry in pools),
        rejected=dict(rejected),
        train_groups=sum(entry.num_groups for entry in pools if entry.side == "train"),
        held_out_groups=sum(entry.num_groups for entry in pools if entry.side == "held_out"),
        first_id=oldest.id,
        last_id=newest.id,
        digest=hashlib.sha256(content).hexdigest(),
    )
    with staged(directory, within=within, points=("window.written", "window.renamed")) as aside:
        (aside / "pools.jsonl.z").write_bytes(zlib.compress(content))
        (aside / "window.json").write_text(data.model_dump_json())
        write_sources(aside, chosen)


def read(directory: Path) -> FrozenWindow:
    """A frozen window, checked against its digest. Raises JobFailed when the file is not what was written."""
    data, content = read_content(directory)
    pools = list(_parse(content))
    return FrozenWindow(
        tuple(entry for entry in pools if entry.side == "train"),
        tuple(entry for entry in pools if entry.side == "held_out"),
        data,
    )


def read_content(directory: Path) -> tuple[DataWindow, bytes]:
    """What a frozen window says of itself, and its pools as they were written, one in a line. Raises as `read`."""
    data = DataWindow.model_validate_json((directory / "window.json").read_text())
    content = zlib.decompress((directory / "pools.jsonl.z").read_bytes())
    if hashlib.sha256(content).hexdigest() != data.digest:
        raise JobFailed("window_damaged", f"the frozen window does not match its digest {data.digest[:16]}")
    return data, content


def _parse(content: bytes) -> Iterator[PromptPool]:
    for line in content.splitlines():
        yield PromptPool.model_validate_json(line)
