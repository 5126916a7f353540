"""What the engines are told, and what they never see."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from bonsai import cpu_lora, engines

SOCKET = Path("/run/bonsai/policy.sock")
INHERITED = {
    "PATH": "/usr/bin",
    "HF_TOKEN": "secret",
    "BONSAI_REDIS_URL": "redis://:secret@redis",
    "PYTHONOPTIMIZE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-7",
    "VLLM_LOGGING_LEVEL": "DEBUG",
}


def option(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_engines_listen_on_their_socket_only() -> None:
    argv = engines.reward_engine_argv(Path("/m"), "rm-0", SOCKET, max_model_len=512, device=())
    assert option(argv, "--uds") == str(SOCKET)
    assert "--host" not in argv
    assert "--port" not in argv


POLICY_SIZES = {"max_model_len": 512, "max_loras": 4, "max_lora_rank": 16}


def test_a_policy_engine_takes_adapters_and_priorities() -> None:
    argv = engines.policy_engine_argv(Path("/m"), "pol-0", SOCKET, **POLICY_SIZES, device=())
    assert "--enable-lora" in argv
    assert option(argv, "--scheduling-policy") == "priority"
    assert option(argv, "--served-model-name") == "pol-0"
    assert option(argv, "--max-lora-rank") == "16"
    assert option(argv, "--max-loras") == "6"  # four policies, and what a job in training samples from


def test_a_reward_engine_scores() -> None:
    argv = engines.reward_engine_argv(Path("/m"), "rm-0", SOCKET, max_model_len=512, device=())
    assert option(argv, "--runner") == "pooling"
    assert "--enable-lora" not in argv


def test_defaults_of_the_model_do_not_change_the_sampling_law() -> None:
    argv = engines.policy_engine_argv(Path("/m"), "pol-0", SOCKET, **POLICY_SIZES, device=())
    assert option(argv, "--generation-config") == "vllm"


def test_on_a_cpu_weights_are_float32_and_run_in_the_engine_process() -> None:
    arguments = engines.cpu_arguments(2**28)
    assert option(arguments, "--dtype") == "float32"
    assert option(arguments, "--distributed-executor-backend") == "uni"
    assert option(arguments, "--kv-cache-memory-bytes") == "268435456"


def test_on_a_gpu_vllm_chooses_and_compiles() -> None:
    arguments = engines.gpu_arguments(0.45)
    assert arguments == ("--dtype", "auto", "--gpu-memory-utilization", "0.45")


def test_an_engine_sees_no_secret_and_no_switch_that_opens_it() -> None:
    environment = engines.engine_environment(INHERITED, runtime=Path("/run/bonsai"), threads=3, gpu=None)
    assert "secret" not in " ".join(environment.values())
    assert not environment.keys() & {"PYTHONOPTIMIZE", "VLLM_SERVER_DEV_MODE", "VLLM_CPU_OMP_THREADS_BIND"}
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"


def test_an_engine_on_a_gpu_sees_that_gpu() -> None:
    environment = engines.engine_environment({}, runtime=Path("/run/bonsai"), threads=1, gpu=1)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment


def test_a_starting_engine_tells_how_far_it_is() -> None:
    log = "INFO [model.py] Resolved architecture: LlamaForCausalLM\n"
    assert engines.engine_phase("") == "importing vLLM"
    assert engines.engine_phase(log) == "importing the model runner"
    assert engines.engine_phase(log + "Starting to load model /m...") == "loading the model"


def test_an_operators_choice_of_plugins_keeps_the_correction_of_adapters_on_cpus() -> None:
    def plugins(chosen: dict[str, str]) -> str | None:
        return engines.engine_environment(chosen, runtime=Path("/r"), threads=1, gpu=None).get("VLLM_PLUGINS")

    assert plugins({}) is None  # vLLM loads all it finds
    assert plugins({"VLLM_PLUGINS": "other"}) == f"other,{engines.CPU_LORA_PLUGIN}"
    assert plugins({"VLLM_PLUGINS": ""}) == engines.CPU_LORA_PLUGIN
    (found,) = entry_points(group="vllm.general_plugins", name=engines.CPU_LORA_PLUGIN)
    assert found.load() is cpu_lora.register
