"""The job that the fault tests of the real stack start: short, offline, the same every time."""

from __future__ import annotations

from tests.fixtures.real_stack import RealStack

N = 8
IMITATION = {
    "type": "bon_forward_kl",
    "bon_forward_kl": {"n": N, "steps": 40, "prompts_per_step": 6, "lora_rank": 8, "lora_alpha": 16},
}


def start(stack: RealStack, window: dict[str, float]) -> str:
    return stack.start_job(IMITATION, n=N, window=window, held_out_fraction=0.2, seed=3)
