"""What a user is told when a process ends, from logs as the real programs write them."""

from __future__ import annotations

import pytest

from bonsai.failure_reason import failure_reason, last_error

BAD_CONFIG = """\
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "model.py", line 1, in create_model_config
(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
"""
ENGINE_CORE = """\
(EngineCore pid=2) ERROR 11-21 00:00:01 [core.py:1] ValueError: head_dim must be a multiple of 32
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
CORE_KILLED = """\
(APIServer pid=1) WARNING 11-21 00:42:28 [core_client.py:817] [shutdown] MPClient: engine core exited unexpectedly
(APIServer pid=1) ERROR 11-21 00:42:28 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore
"""
BAD_SETTING = "BONSAI_ADMIN_KEY_FILE: Value error, admin.key has mode 0644; it must be 0600"
NO_VLLM = "Python cannot find the package 'vllm': is everything installed?"
TORCH_MEMORY = "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
KV_CACHE = (
    "ValueError: To serve at least one request, 9 GiB is needed, which is larger than the available KV cache memory"
)


@pytest.mark.parametrize(
    ("status", "log", "expected"),
    [
        (1, "OSError: [Errno 98] Address already in use", "its port or socket is taken by another program"),
        (137, "loading…", "it was killed from outside; most often the machine ran out of memory"),
        (1, "MemoryError", "not enough memory: MemoryError"),
        (1, TORCH_MEMORY, f"not enough memory: {TORCH_MEMORY}"),
        (1, KV_CACHE, f"not enough memory: {KV_CACHE}"),
        (1, "OSError: [Errno 28] No space left on device", "the disk is full"),
        (1, "ModuleNotFoundError: No module named 'vllm'", NO_VLLM),
        (1, BAD_CONFIG, "ValidationError: 1 validation error for ModelConfig"),
        (1, ENGINE_CORE, "ValueError: head_dim must be a multiple of 32"),
        (2, BAD_SETTING, BAD_SETTING),
        (0, CORE_KILLED, "its model runner was killed from outside; most often the machine ran out of memory"),
        (127, "cannot start redis: No such file or directory", "its program could not be started"),
        (0, "", "it ended by itself"),
        (3, "", "it ended with status 3"),
    ],
)  # fmt: skip
def test_reason(status: int, log: str, expected: str) -> None:
    assert failure_reason(status, log) == expected


def test_a_wrapped_error_is_not_the_cause() -> None:
    assert last_error(ENGINE_CORE) == "ValueError: head_dim must be a multiple of 32"


def test_prose_that_mentions_an_error_is_none() -> None:
    assert last_error("the ValueError above is harmless") is None
