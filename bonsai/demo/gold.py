"""The demo's gold reward as a reward function: what a report's second opinion is there.

Neither served nor learned from: it is what the simulated annotators only approximate (`grammar`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bonsai.demo.grammar import gold_reward


def reward(prompt: str | Sequence[dict[str, Any]], completions: Sequence[str]) -> list[float]:
    """Points of each completion. prompt: a text, or a conversation, whose last message names the film."""
    asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    return [gold_reward(asked, completion) for completion in completions]
