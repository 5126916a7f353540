"""Files that jobs learn from: a line or row of one (docs/training-files.md), and what is known of one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bon_algos.contracts.record import DEFAULT_TENANT, FileId, PolicyId, Record
from bon_algos.contracts.serving import FinishReason, Message

TokenId = Annotated[int, Field(ge=0)]
LogProb = Annotated[float, Field(le=0)]


class RowCompletion(Record):
    """A completion of which more is known than its text."""

    text: str | None = None
    token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True, min_length=1)] | None = None
    """The policy's own, with the end-of-sequence token where it stopped at one; the text's, where they are left out."""
    logprobs: tuple[LogProb, ...] | None = Field(None, fail_fast=True)
    """Of each token under the policy that drew it, at temperature 1; nats. Where they are left out, the trainer
    computes what it needs."""
    finish_reason: FinishReason = "stop"

    @model_validator(mode="after")
    def agrees(self) -> RowCompletion:
        if self.text is None and self.token_ids is None:
            raise ValueError("has neither text nor token_ids")
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids or ()):
            raise ValueError("has logprobs, and not one for each of its token_ids")
        return self


class RowSampling(Record):
    """The law of a row's completions, where it was another than the policy itself."""

    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """None: as many as the longest completion of the file has."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


class TrainingRow(Record):
    """One prompt, its completions and what they are worth: a line of a JSONL file, a row of a Parquet file."""

    id: str | None = Field(None, min_length=1, max_length=64)
    """Unlike every other of the file."""
    prompt: str | None = Field(None, min_length=1)
    messages: Annotated[tuple[Message, ...], Field(fail_fast=True, min_length=1, max_length=1000)] | None = None
    prompt_token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True, min_length=1)] | None = None
    completions: tuple[str | RowCompletion, ...] = Field(fail_fast=True, min_length=1, max_length=4096)
    rewards: tuple[Annotated[float, Field(ge=-1e8, le=1e8)], ...] | None = Field(None, fail_fast=True)
    """One for each completion, the higher the better. Where they are left out, the job's reward model gives them."""
    policy: Literal["base"] | PolicyId | None = None
    """Who drew the completions: the base policy, a published one, or, left out, somebody nobody here knows."""
    sampling: RowSampling = RowSampling()
    session: str | None = Field(None, min_length=1, max_length=256)
    """Rows of one session never fall on both sides of a train/held-out split."""

    @model_validator(mode="after")
    def agrees(self) -> TrainingRow:
        given = sum(one is not None for one in (self.prompt, self.messages, self.prompt_token_ids))
        if given != 1:
            raise ValueError(f"has {given} of prompt, messages and prompt_token_ids instead of one")
        if self.rewards is not None and len(self.rewards) != len(self.completions):
            raise ValueError(f"has {len(self.rewards)} rewards for {len(self.completions)} completions")
        return self


class RowFault(Record):
    """What is wrong with a line of a file."""

    line: int | None
    """From 1 on, of a Parquet file its row; None: the file as a whole."""
    message: str


class FileRecord(Record):
    """What is known of an uploaded file."""

    id: FileId
    tenant: str = DEFAULT_TENANT
    filename: str
    bytes: int
    created_at: float
    digest: str
    """sha256 of its content, by which it is stored."""
    stored_as: str = Field(pattern=r"^[0-9a-f]{64}-[0-9a-f]{8}$")
    """Its name in its tenant's directory: the digest, and what tells this upload from another of the same content."""
    format: Literal["jsonl", "parquet"]
    status: Literal["processed", "error"]
    rows: int
    """Without fault, up to where reading ended."""
    faults: tuple[RowFault, ...] = ()
    """The first ones."""
    has_rewards: bool = False
    """All of its rows do, or none."""
    longest_completion: int = 0
    """Tokens."""
    window: int
    """Of the policy engine, which its rows fit in; tokens."""
    policy_template_digest: str
    """Of the tokenizer and chat template that they were read with."""

    @property
    def path(self) -> str:
        """Below the directory of artefacts."""
        return f"files/{self.tenant}/{self.stored_as}"
