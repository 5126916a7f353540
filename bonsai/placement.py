"""Which share of the machine each process of the stack gets. Pure functions; measures nothing.

Two engines whose OpenMP threads outnumber the cores spin against each other, so the threads of the policy
engine, the reward engine and the worker together never exceed the cores.
"""

from __future__ import annotations

from dataclasses import dataclass

CANDIDATES_IN_FLIGHT = 64
"""Full-length sequences for which a key-value cache is sized: one request at the cap of n."""
SMALLEST_CACHE = 128 * 2**20
LARGEST_CACHE = 4 * 2**30


@dataclass(frozen=True)
class Placement:
    """Threads on CPUs; shares of a GPU's memory and which GPU, where there is one."""

    policy_threads: int
    reward_threads: int
    worker_threads: int
    policy_gpu: int | None = None
    reward_gpu: int | None = None
    worker_gpu: int | None = None
    policy_gpu_share: float | None = None
    reward_gpu_share: float | None = None


def place(cores: int, gpus: int) -> Placement:
    """Spread three computing processes over `cores` (at least 1) and `gpus`.

    On a CPU the policy engine gets half of what is left after one core for the gateway, Redis and HTTP, because
    it draws n candidates for each prompt that the reward engine reads once; reward engine and worker share the
    rest. With fewer than four cores each gets one thread and the kernel balances them.
    On one GPU the policy engine takes 45 % of the memory and the reward engine 20 %: training needs the rest.
    """
    if gpus == 0:
        return _on_cpu(cores)
    several = gpus > 1
    return Placement(
        policy_threads=1,
        reward_threads=1,
        worker_threads=max(1, cores // 4),
        policy_gpu=0,
        reward_gpu=1 if several else 0,
        worker_gpu=gpus - 1,
        policy_gpu_share=0.9 if several else 0.45,
        reward_gpu_share=0.9 if gpus > 2 else 0.2,
    )


def _on_cpu(cores: int) -> Placement:
    if cores < 4:
        return Placement(policy_threads=1, reward_threads=1, worker_threads=1)
    computing = cores - 1
    policy = max(1, computing // 2)
    reward = max(1, (computing - policy) // 2)
    return Placement(policy_threads=policy, reward_threads=reward, worker_threads=computing - policy - reward)


def cache_bytes(bytes_per_token: int, max_model_len: int) -> int:
    """Memory for keys and values on a CPU: `CANDIDATES_IN_FLIGHT` sequences of full length, within bounds.

    The lower bound costs nothing; the upper one still holds one full sequence, or the engine would not start.
    Filling it takes about 3 s per GiB at start-up.
    """
    wanted = CANDIDATES_IN_FLIGHT * max_model_len * bytes_per_token
    one_sequence = 2 * max_model_len * bytes_per_token
    return max(min(max(wanted, SMALLEST_CACHE), LARGEST_CACHE), one_sequence)
