"""Which logged groups a job can learn from, and whether what is left suffices. Without torch, without I/O.

Owns: the criteria and the names of what they reject, the split into train and held-out, and why a window cannot teach.
Does not own: reading groups, feedback or files, what a prompt's pooled candidates become (worker/dataset.py).
The worker that freezes a window and the gateway that tells beforehand what it would freeze both ask here.

Groups of one prompt under one law are independent draws of who drew them, so they are pooled: weights and
quantiles of a prompt use all of its candidates. Which side a prompt is on depends on its tokens and its
sessions alone: prompts that share a session, directly or through others, stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Final, Literal, NamedTuple

from bon_algos.contracts import ANY_LAW_METHODS, Candidate, CandidateGroup, Feedback, FeedbackFilter, JobSpec
from bon_algos.serving_order import serving_ranks_of

MIN_PROMPTS: Final = 2
"""On either side: a baseline and an interval need another prompt."""

MIN_FINGERPRINT_TOKENS: Final = 256
"""Of held-out completions: fewer do not tell a policy from its base."""

Side = Literal["train", "held_out"]
Prompt = tuple[int, ...]
FeedbackOf = Callable[[str], Sequence[Feedback]]
"""What counts of the feedback on a group, by its id."""


class Unusable(ValueError):
    """Why nothing can be learned; it holds the numbers."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


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
    tags: tuple[str, ...] = ()
    feedback: FeedbackFilter | None = None
    is_any_law: bool = False
    """Whoever drew them, and however."""
    is_scored: bool = True
    """False: rewards are still to be measured."""

    @classmethod
    def of(cls, spec: JobSpec, *, base_policy: str, reward_model: str, reward_template_digest: str) -> Requirements:
        window, from_file = spec.window, spec.training_file is not None
        return cls(
            reference_policy=spec.reference_policy(base_policy),
            reward_model=reward_model,
            reward_template_digest=reward_template_digest,
            num_candidates=spec.method.spec.candidates_needed,
            since=window.since,
            until=window.until,
            other_policies=window.policies,
            tags=window.tags,
            feedback=window.feedback,
            is_any_law=from_file and spec.method.type in ANY_LAW_METHODS,
        )

    @property
    def takes_all_draws(self) -> bool:
        """Whether the reference's candidates that it leaves are draws of its law: neither picked by what was said of
        them, nor drawn in whatever way."""
        return self.feedback is None and not self.is_any_law


# --- choosing --------------------------------------------------------------------------------------------


def rejection(group: CandidateGroup, wanted: Requirements) -> str | None:
    """Why a group cannot be learned from; None when it can, as far as the group itself tells."""
    if wanted.until is not None and group.created_at > wanted.until:
        return "too_new"
    if wanted.since is not None and group.created_at < wanted.since:
        return "too_old"
    if not group.store:
        return "not_stored"
    if not set(wanted.tags) <= set(group.tags):
        return "other_tags"
    if not wanted.is_any_law and group.policy_id not in (wanted.reference_policy, *wanted.other_policies):
        return "other_policy"
    if group.reward_model_id != wanted.reward_model:
        return "other_reward_model"
    if group.reward_template_digest != wanted.reward_template_digest:
        return "other_reward_template"
    if not wanted.is_any_law and not group.sampling.is_policy_law:
        return "changed_law"
    if not group.is_fixed:
        return "not_fixed"
    whole = group.scored if wanted.is_scored else group.candidates
    if len(whole) != group.requested or any(not candidate.token_ids for candidate in group.candidates):
        return "incomplete"
    return None


def feedback_rejection(said: Sequence[Feedback], wanted: FeedbackFilter) -> str | None:
    """Why what was said about a group does not suffice; None when it does."""
    asked = [one for one in said if wanted.name in (None, one.name)]
    if not asked:
        return "no_feedback"
    if wanted.at_least is None:
        return None
    values = [float(one.value) for one in asked if isinstance(one.value, bool | float)]
    if not values:
        return "no_feedback"
    return "feedback_below" if sum(values) / len(values) < wanted.at_least else None


class Choice:
    """The first `max_groups` that fit, in the order they are offered, and how many did not, by reason."""

    def __init__(self, wanted: Requirements, max_groups: int, feedback_of: FeedbackOf | None = None) -> None:
        """feedback_of: where feedback is wanted; asked of groups that nothing else is wrong with."""
        self.chosen: list[CandidateGroup] = []
        self.rejected: Counter[str] = Counter()
        self._wanted, self._max_groups, self._feedback_of = wanted, max_groups, feedback_of
        self._seeds: set[tuple[str, Prompt, int]] = set()

    @property
    def is_full(self) -> bool:
        return len(self.chosen) >= self._max_groups

    def offer(self, group: CandidateGroup) -> bool:
        """Whether it was taken; not once it is full."""
        reason = rejection(group, self._wanted) or self._feedback_rejection(group) or self._repetition(group)
        if reason is not None:
            self.rejected[reason] += 1
        elif not self.is_full:
            self.chosen.append(group)
            return True
        return False

    def _feedback_rejection(self, group: CandidateGroup) -> str | None:
        wanted = self._wanted.feedback
        if wanted is None or self._feedback_of is None:
            return None
        return feedback_rejection(self._feedback_of(group.id), wanted)

    def _repetition(self, group: CandidateGroup) -> str | None:
        """The engine repeats itself for a repeated seed: the second group is no second draw."""
        if group.sampling.seed is None:
            return None
        seed = (group.policy_id, group.prompt_token_ids, group.sampling.seed)
        is_repeated = seed in self._seeds
        self._seeds.add(seed)
        return "repeated_seed" if is_repeated else None


def choose(
    groups: Iterable[CandidateGroup], wanted: Requirements, max_groups: int, feedback_of: FeedbackOf | None = None
) -> Choice:
    """The choice among the groups, made until it is full."""
    choice = Choice(wanted, max_groups, feedback_of)
    for group in groups:
        choice.offer(group)
        if choice.is_full:
            break
    return choice


# --- splitting -------------------------------------------------------------------------------------------


def split_sides(
    groups: Sequence[CandidateGroup], held_out_fraction: float, trained_before: Set[Prompt] = frozenset()
) -> dict[Prompt, Side]:
    """The side of every prompt, by a hash of the prompts and sessions it is linked with.

    A family is what shares a prompt or a session, directly or through others. Families whose hash falls below
    the fraction are held out, and the lowest ones in any case until there are `MIN_PROMPTS`, so that a small
    window can be evaluated. A family with a prompt of `trained_before`, which an ancestor of the policy has learned
    from, is never held out. ValueError when no split leaves `MIN_PROMPTS` on either side.
    """
    families = sorted((_family_hash(family), sorted(family)) for family in _families(groups))
    sides: dict[Prompt, Side] = {}
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


def _families(groups: Sequence[CandidateGroup]) -> list[set[Prompt]]:
    """Prompts joined by the sessions they occurred in."""
    parent: dict[Prompt | str, Prompt | str] = {}

    def root(node: Prompt | str) -> Prompt | str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for group in groups:
        prompt = root(group.prompt_token_ids)
        if group.session is not None:
            parent[root(group.session)] = prompt
    members: dict[Prompt | str, set[Prompt]] = {}
    for prompt_ids in {group.prompt_token_ids for group in groups}:
        members.setdefault(root(prompt_ids), set()).add(prompt_ids)
    return list(members.values())


def _family_hash(family: set[Prompt]) -> float:
    """In [0, 1): where the family's first prompt falls, the same in every window that contains it."""
    first = json.dumps(min(family)).encode()
    return int.from_bytes(hashlib.blake2b(first, digest_size=8).digest()) / 2**64


# --- what suffices ---------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """The groups of one prompt under one law, the oldest first."""

    prompt: Prompt
    side: Side
    groups: Sequence[CandidateGroup]

    @property
    def num_candidates(self) -> int:
        return sum(group.requested for group in self.groups)

    @property
    def scored(self) -> list[Candidate]:
        """All candidates that have a reward, in drawing order."""
        return [one for group in self.groups for one in group.candidates if one.reward is not None]

    @property
    def ranks(self) -> list[float]:
        """Of those, as they are served."""
        return [float(rank) for rank in serving_ranks_of(self.scored)[0]]


def pool(groups: Sequence[CandidateGroup], sides: dict[Prompt, Side]) -> list[Pool]:
    """One pool for each prompt and length limit, ordered by its tokens."""
    by_law: dict[tuple[Prompt, int, tuple[str, ...]], list[CandidateGroup]] = {}
    for group in sorted(groups, key=lambda group: (group.created_at, group.id)):
        key = (group.prompt_token_ids, group.sampling.max_tokens, group.sampling.stop)
        by_law.setdefault(key, []).append(group)
    return [Pool(key[0], sides[key[0]], by_law[key]) for key in sorted(by_law)]


def usable_pools(
    choice: Choice, wanted: Requirements, held_out_fraction: float, trained_before: Set[Prompt] = frozenset()
) -> list[Pool]:
    """The chosen groups' pools that have enough candidates; those of the others are counted as rejected.

    Raises Unusable when too little is left on either side, or when nothing that is left tells good from bad.
    """
    chosen, read = choice.chosen, f"{len(choice.chosen)} usable groups of the window, rejected {dict(choice.rejected)}"
    if not chosen:
        raise Unusable("empty_window", read)
    try:
        pools = pool(chosen, split_sides(chosen, held_out_fraction, trained_before))
    except ValueError as error:
        raise Unusable("too_few_prompts", f"{error}; each side needs {MIN_PROMPTS}; {read}") from None
    usable = [entry for entry in pools if entry.num_candidates >= wanted.num_candidates]
    largest = max(entry.num_candidates for entry in pools)
    for side in ("train", "held_out"):
        if sum(entry.side == side for entry in usable) < MIN_PROMPTS:
            message = f"best-of-{wanted.num_candidates} needs that many candidates of a prompt; the largest of "
            raise Unusable("too_few_candidates", f"{message}{len(pools)} prompts has {largest}; {read}")
    ranks = [entry.ranks for entry in usable] if wanted.is_scored else []
    if ranks and all(len(set(row)) == 1 for row in ranks) and any(len(row) > 1 for row in ranks):
        raise Unusable("rewards_all_equal", f"no prompt of {len(usable)} has two different rewards; {read}")
    num_small = sum(len(entry.groups) for entry in pools) - sum(len(entry.groups) for entry in usable)
    choice.rejected.update({"too_few_candidates": num_small} if num_small else {})
    return usable
