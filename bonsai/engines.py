"""How the two vLLM engines are started: their command lines, environments and what they are busy with.

Pure functions for vLLM 0.32. Does not start anything (`processes`), does not speak to an engine.

On CPUs the engine's model runs in the engine-core process (`uni`), not in a worker process of its own: for
small models the hop between the two costs more than the step (16 candidates of a model with half a million
parameters, two busy cores: 3,170 tokens per second against 1,120), and it saves one import of PyTorch at
start-up. vLLM only allows that with VLLM_ENABLE_V1_MULTIPROCESSING=0, which for a server decides nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

# As a module vLLM's entry point would be imported again by each of its child processes; as a `-c` it is not. The
# garbage collector finds nothing in half a million new module objects and takes a quarter of the import for it.
ENTRY = (
    "-c",
    "import gc; gc.disable(); from vllm.entrypoints.launchers.api_server.entry import main; gc.enable(); main()",
)
LORA_RANKS = (8, 16, 32, 64, 128, 256)
CPU_LORA_PLUGIN = "bonsai_cpu_lora"
"""`cpu_lora.register`, by the name of its entry point."""
JSON_OUTPUT = {"backend": "guidance", "disable_any_whitespace": True}
"""Where white space is free a small model writes nothing else until its tokens are spent."""
JOB_LORAS = 2
"""A job in training lends the engine its policy and its anchor."""
NOT_INHERITED = (
    "BONSAI_",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "PYTHONOPTIMIZE",
    "VLLM_CPU_",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
)
"""Beginnings of variables an engine never sees: secrets it has no use for, switches that unlock remote code
execution or disable the asserts that guard it (CVE-2026-41523), and placement, which is decided here."""


def policy_engine_argv(
    model: Path,
    policy_id: str,
    socket: Path,
    *,
    max_model_len: int,
    max_loras: int,
    max_lora_rank: int,
    device: tuple[str, ...],
) -> tuple[str, ...]:
    """Generation with adapters loaded at run time; live traffic goes before the rollouts of jobs.

    Every adapter is padded to `max_lora_rank`, and on CPUs each sequence copies its adapter at every token: there the
    rank decides what a distilled policy's sample costs."""
    return (
        *_engine_argv(model, policy_id, socket, max_model_len, device),
        "--enable-lora",
        "--max-lora-rank",
        str(max_lora_rank),
        "--max-loras",
        str(max_loras + JOB_LORAS),
        "--scheduling-policy",
        "priority",
        "--structured-outputs-config",
        json.dumps(JSON_OUTPUT),
    )


def fingerprint_tolerance(is_gpu: bool) -> float:
    """Nats by which an engine's log-probs may differ from the trainer's: bf16 on a GPU, float32 elsewhere."""
    return 2e-2 if is_gpu else 1e-3


def reward_engine_argv(
    model: Path, reward_model_id: str, socket: Path, *, max_model_len: int, device: tuple[str, ...]
) -> tuple[str, ...]:
    return (*_engine_argv(model, reward_model_id, socket, max_model_len, device), "--runner", "pooling")


def _engine_argv(model: Path, name: str, socket: Path, max_model_len: int, device: tuple[str, ...]) -> tuple[str, ...]:
    """Requests and outputs are not logged (vLLM's default, kept); no access log: paths say nothing of use."""
    return (
        sys.executable,
        *ENTRY,
        "--model",
        str(model),
        "--served-model-name",
        name,
        "--uds",
        str(socket),
        "--max-model-len",
        str(max_model_len),
        "--generation-config",
        "vllm",
        "--disable-uvicorn-access-log",
        *device,
    )


def cpu_arguments(cache_bytes: int) -> tuple[str, ...]:
    return (
        "--dtype",
        "float32",
        "--enforce-eager",
        "--distributed-executor-backend",
        "uni",
        "--kv-cache-memory-bytes",
        str(cache_bytes),
    )


def gpu_arguments(memory_share: float) -> tuple[str, ...]:
    return ("--dtype", "auto", "--gpu-memory-utilization", f"{memory_share:g}")


def engine_environment(inherited: Mapping[str, str], *, runtime: Path, threads: int, gpu: int | None) -> dict[str, str]:
    """What an engine sees: nothing of the network, nothing of Redis, its threads or its GPU.

    The policy engine alone would need the LoRA switch; a pooling engine mounts no such route.
    """
    kept = {name: value for name, value in inherited.items() if not name.startswith(NOT_INHERITED)}
    engine = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_RPC_BASE_PATH": str(runtime),
        "OMP_NUM_THREADS": str(threads),
    }
    if (chosen := inherited.get("VLLM_PLUGINS")) is not None:  # an operator's choice must not undo a correction
        engine["VLLM_PLUGINS"] = ",".join(filter(None, (chosen, CPU_LORA_PLUGIN)))
    if gpu is None:
        return kept | engine | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return kept | engine | {"CUDA_VISIBLE_DEVICES": str(gpu)}


_PHASES = (
    ("Starting vLLM server", "opening its socket"),
    ("CPU KV cache size", "making the key-value cache"),
    ("GPU KV cache size", "making the key-value cache"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting the model runner"),
    ("Resolved architecture", "importing the model runner"),
)


def engine_phase(log_tail: str) -> str:
    """What a starting engine is busy with, by the last milestone in its log."""
    return next((phase for milestone, phase in _PHASES if milestone in log_tail), "importing vLLM")
