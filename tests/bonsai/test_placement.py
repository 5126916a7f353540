"""Shares of the machine, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonsai.placement import LARGEST_CACHE, SMALLEST_CACHE, Placement, cache_bytes, place


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        (1, (1, 1, 1)),
        (2, (1, 1, 1)),
        (4, (1, 1, 1)),  # 3 compute: half is 1, half of the other 2 is 1, 1 is left
        (8, (3, 2, 2)),  # 7 compute: 3; 4 are left: 2 and 2
        (16, (7, 4, 4)),  # 15 compute: 7; 8 are left: 4 and 4
    ],
)
def test_threads_of_policy_reward_and_worker(cores: int, threads: tuple[int, int, int]) -> None:
    found = place(cores, gpus=0)
    assert (found.policy_threads, found.reward_threads, found.worker_threads) == threads


@given(st.integers(4, 512))
def test_threads_leave_one_core_for_everything_else(cores: int) -> None:
    found = place(cores, gpus=0)
    assert found.policy_threads + found.reward_threads + found.worker_threads == cores - 1
    assert found.policy_threads + 1 >= found.reward_threads >= 1


def test_on_one_gpu_training_keeps_a_third_of_the_memory() -> None:
    found = place(16, gpus=1)
    assert (found.policy_gpu, found.reward_gpu, found.worker_gpu) == (0, 0, 0)
    assert found.policy_gpu_share is not None
    assert found.reward_gpu_share is not None
    assert 1 - found.policy_gpu_share - found.reward_gpu_share == pytest.approx(0.35)


def test_with_three_gpus_nobody_shares() -> None:
    found = place(16, gpus=3)
    assert {found.policy_gpu, found.reward_gpu, found.worker_gpu} == {0, 1, 2}


def test_without_a_gpu_nothing_names_one() -> None:
    assert place(4, gpus=0) == Placement(policy_threads=1, reward_threads=1, worker_threads=1)


def test_a_cache_holds_64_full_sequences() -> None:
    # 2 (keys, values) · 4 layers · 8 heads · 64 · 4 B = 16 KiB a token; 64 · 512 tokens = 512 MiB
    assert cache_bytes(16 * 1024, 512) == 512 * 2**20


@given(st.integers(1, 2**22), st.integers(1, 2**17))
def test_a_cache_is_bounded_unless_one_sequence_needs_more(bytes_per_token: int, max_model_len: int) -> None:
    found = cache_bytes(bytes_per_token, max_model_len)
    one_sequence = bytes_per_token * max_model_len
    assert found >= max(SMALLEST_CACHE, one_sequence)
    assert found <= max(LARGEST_CACHE, 2 * one_sequence)
