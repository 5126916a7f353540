"""Rows of an uploaded file as candidate groups, which is what jobs learn from.

Owns: tokens of texts, who stands for a sampler that nobody here knows, what a row must fit in. Does not own: reading
files (`row_files`), which groups are fit to learn from (`acceptance`).
The gateway that checks a file and the worker that learns from it read its rows here, so both see the same groups.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple, Self

from bon_algos.acceptance import Requirements
from bon_algos.chat import ChatTokenizer, TemplateRefused
from bon_algos.contracts import (
    Arm,
    Candidate,
    CandidateGroup,
    FileRecord,
    PolicyId,
    RowCompletion,
    RowSampling,
    Sampling,
    TrainingRow,
)


class UnfitRow(ValueError):
    """Why a row is no group of this policy's; the text names the member and holds nothing of the content."""


class Source(NamedTuple):
    """Where rows come from and what they are read for."""

    file_id: str
    base_policy_id: str
    reward_model_id: str
    reward_template_digest: str
    window: int
    """Of the policy engine, tokens."""
    longest_completion: int
    """Of the file, tokens; what a completion might have had, where a row does not tell."""
    created_at: float

    @classmethod
    def of(cls, record: FileRecord, wanted: Requirements) -> Self:
        """Of a file that was checked, for what a job wants of it."""
        return cls(
            record.id,
            wanted.reference_policy,
            wanted.reward_model,
            wanted.reward_template_digest,
            record.window,
            record.longest_completion,
            record.created_at,
        )


def sampler_of(file_id: str) -> PolicyId:
    """Who drew the completions of a file that nobody is named for: no policy that was ever published."""
    return f"pol-{sha256(file_id.encode()).hexdigest()[:16]}"


def group_of(row: TrainingRow, line: int, source: Source, tokenizer: ChatTokenizer) -> CandidateGroup:
    """A row's group. Raises UnfitRow."""
    prompt, prompt_ids = _prompt(row, tokenizer)
    candidates = tuple(
        _candidate(completion, None if row.rewards is None else row.rewards[i], i, tokenizer)
        for i, completion in enumerate(row.completions)
    )
    longest = max(len(candidate.token_ids) for candidate in candidates)
    if len(prompt_ids) + longest > source.window:
        raise UnfitRow(
            f"prompt and completion have {len(prompt_ids)} and {longest} tokens; the policy's window is {source.window}"
        )
    named = source.base_policy_id if row.policy == "base" else row.policy
    policy_id = named or sampler_of(source.file_id)
    return CandidateGroup(
        id=f"{source.file_id}:{line}",
        created_at=source.created_at,
        route="upload",
        arm=Arm(policy=policy_id, n=len(candidates)),
        arm_reason="default",
        session=row.session,
        policy_id=policy_id,
        reward_model_id=source.reward_model_id,
        reward_template_digest=source.reward_template_digest,
        policy_template_digest=tokenizer.template_digest,
        settings_digest="",
        prompt=prompt,
        messages=row.messages,
        prompt_token_ids=tuple(prompt_ids),
        sampling=_sampling(row.sampling, longest, source.window - len(prompt_ids), source),
        requested=len(candidates),
        candidates=candidates,
        selected=None,
        status="unscored",
    )


def _sampling(law: RowSampling, longest: int, room: int, source: Source) -> Sampling:
    """longest: completion of the row; room: behind its prompt; tokens."""
    if law.max_tokens is not None and not longest <= law.max_tokens <= room:
        raise UnfitRow("sampling.max_tokens is less than a completion has, or more than the window has room for")
    max_tokens = law.max_tokens or min(max(source.longest_completion, longest), room)
    return Sampling(max_tokens=max_tokens, temperature=law.temperature, top_p=law.top_p, top_k=law.top_k)


def _prompt(row: TrainingRow, tokenizer: ChatTokenizer) -> tuple[str, list[int]]:
    if row.prompt_token_ids is not None:
        _require_vocabulary(row.prompt_token_ids, "prompt_token_ids", tokenizer)
        return tokenizer.decode(row.prompt_token_ids), list(row.prompt_token_ids)
    if row.messages is None:
        prompt = row.prompt or ""
        return prompt, tokenizer.encode_prompt(prompt)
    try:
        return tokenizer.encode_messages(row.messages, add_generation_prompt=True)
    except TemplateRefused as error:
        raise UnfitRow(f"the policy's chat template refuses messages: {error}") from None


def _candidate(said: str | RowCompletion, reward: float | None, place: int, tokenizer: ChatTokenizer) -> Candidate:
    completion = RowCompletion(text=said) if isinstance(said, str) else said
    name = f"completions[{place}]"
    if completion.token_ids is not None:
        token_ids = list(completion.token_ids)
        _require_vocabulary(token_ids, f"{name}.token_ids", tokenizer)
    else:
        token_ids = _token_ids(completion, name, tokenizer)
    return Candidate(
        text=tokenizer.decode(token_ids) if completion.text is None else completion.text,
        token_ids=tuple(token_ids),
        logprobs=completion.logprobs or (),
        finish_reason=completion.finish_reason,
        reward=reward,
    )


def _token_ids(completion: RowCompletion, name: str, tokenizer: ChatTokenizer) -> list[int]:
    token_ids = tokenizer.encode_chat(completion.text or "")
    if completion.finish_reason == "stop":
        if tokenizer.end_token_id is None:
            raise UnfitRow(f"{name} needs token_ids: the tokenizer does not say how a completion ends")
        token_ids.append(tokenizer.end_token_id)
    if not token_ids:
        raise UnfitRow(f"{name} was cut off before its first token")
    return token_ids


def _require_vocabulary(token_ids: tuple[int, ...] | list[int], name: str, tokenizer: ChatTokenizer) -> None:
    if max(token_ids) >= tokenizer.vocabulary_size:
        raise UnfitRow(f"{name} must be below {tokenizer.vocabulary_size}, the size of the policy's vocabulary")
