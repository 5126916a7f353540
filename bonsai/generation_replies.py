"""What a caller of ours reads of an answer.

Owns its members. Does not own asking for it (client.py), nor other replies.
"""

from __future__ import annotations

from bonsai.job_replies import Reply


class Choice(Reply):
    """One candidate of an answer, in drawing order."""

    text: str
    reward: float | None
    finish_reason: str | None
    failure: str | None = None
    tokens: int
    logprob: float | None = None
    selected: bool = False

    @property
    def is_complete(self) -> bool:
        return self.finish_reason == "stop" and self.text.strip() != ""


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    discarded_tokens: int

    @property
    def generated_tokens(self) -> int:
        """What the engine had to generate for this answer."""
        return self.completion_tokens + self.discarded_tokens


class Selection(Reply):
    status: str
    reward: float | None = None
    margin: float | None = None


class Generation(Reply):
    id: str
    completion: str
    finish_reason: str | None
    reward: float | None
    arm: str
    arm_reason: str
    policy: str
    selection: Selection
    usage: Usage
    choices: tuple[Choice, ...] = ()
    warnings: tuple[str, ...] = ()
