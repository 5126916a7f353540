"""What a stack consists of: models, places, and for each process its command, environment and probe.

Owns the translation of a user's options into `ProcessSpec`s and into the `BONSAI_…` variables that gateway and
worker read. Starts nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import bonsai
from bon_algos.contracts import RewardConfig
from bonsai import engines, function_reward, model_directory, probes, redis_server
from bonsai.model_directory import ModelDirectory
from bonsai.placement import Placement, cache_bytes, place
from bonsai.processes import ProcessSpec
from bonsai.redis_server import RedisServer
from bonsai.reward_function import RewardFunction, function_spec, open_function
from bonsai.reward_plan import Reward, RewardDirectory, config_of, open_directory, read_config
from bonsai.runtime_directory import StateDirectory
from service.known_pairs import NO_PAIRS, read_pairs, tested

SHIPPED_MODELS = Path(bonsai.__file__).parent / "demo" / "models"
DEMO_JUDGE = "bonsai.demo.gold:reward"
SECRETS_OF_OURS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "BONSAI_API_KEY")
"""To fetch a model, and for clients of a gateway; no process of the stack needs them."""
UNTESTED = (
    "the reward model is untested: nobody has seen that it tells better from worse. "
    "--reward-pairs takes pairs of which you know the better"
)
GATEWAY_SHUTDOWN_SECONDS = 2
"""For requests that run when the stack is taken down: all of it has ten seconds."""
WORKER_NICENESS = 5
"""Answering comes before learning where they share cores."""


@dataclass(frozen=True)
class Options:
    """What a user can say about a stack."""

    directory: Path = Path(".bonsai")
    """Everything that lasts: Redis' file, adapters, the gateway's spool, logs."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    policy: str = ""
    """A directory or a hub id; "" is the demo's."""
    reward: str = ""
    """The same; not with one of the next two."""
    reward_function: str = ""
    """module:function, from the current directory or PYTHONPATH."""
    reward_config: Path | None = None
    """A RewardConfig as JSON: reward models that somebody else runs."""
    reward_seconds: float = function_reward.SECONDS
    """That one call of the reward function may take."""
    reward_pairs: str = ""
    """A file of known pairs, or "none": the reward model is not tested; "" is the demo's for the demo's reward model,
    for another what the gateway has built in."""
    judge_function: str = ""
    """module:function: a second reward model for reports; "" is the demo's for the demo's models, none for others."""
    judge_config: Path | None = None
    """A RewardConfig as JSON, instead."""
    redis_url: str | None = None
    """A server that somebody else runs. May hold a password: never printed, never in a command line."""
    max_loras: int = 4
    """Policies that the engine holds beside the base; a job that samples from it gets two more places."""
    max_lora_rank: int | None = None
    """Largest rank of a policy's adapter, one of `engines.LORA_RANKS`; None: as `Plan.max_lora_rank` says."""
    max_model_len: int = 8192
    """Tokens; a model whose own window is shorter keeps its own."""
    cores: int | None = None
    """To compute with; None: all that this process may use."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    """What the processes inherit; `BONSAI_…` settings of gateway and worker pass through."""


@dataclass(frozen=True)
class Plan:
    """Options, checked; nothing is started yet."""

    options: Options
    policy: ModelDirectory
    policy_id: str
    reward: Reward
    judge: RewardFunction | RewardConfig | None
    """None: reports have one reward model's opinion alone."""
    redis: RedisServer | None
    """None: `options.redis_url` is used."""
    placement: Placement

    @property
    def max_lora_rank(self) -> int:
        """Small on CPUs, where every sequence pays for the largest rank there may be, whatever it wears."""
        return self.options.max_lora_rank or (8 if self.placement.policy_gpu is None else 32)

    @property
    def warnings(self) -> tuple[str, ...]:
        of_redis = self.redis.warning if self.redis is not None else ""
        return tuple(filter(None, (of_redis, "" if self._is_tested else UNTESTED)))

    @property
    def _is_tested(self) -> bool:
        """What the gateway will say of itself, before it is started."""
        return bool(tested(reward_pairs(self), config_of(self.reward, Path("/"))))


def prepare(options: Options) -> Plan:
    """Resolve and check everything that can be checked before a process starts.

    Downloads a hub id (network) and reads the weights once to name them (minutes for big ones, then cached).
    Raises BadModel, FunctionError, NoRedisServer or OSError.
    """
    options.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    digests = options.directory / "model-digests.json"
    policy_path = model_directory.resolve(options.policy, "policy", SHIPPED_MODELS / "policy")
    policy = model_directory.open_model(policy_path, "policy", options.max_model_len)
    if options.reward_pairs not in ("", NO_PAIRS):
        try:
            read_pairs(Path(options.reward_pairs))
        except ValueError as error:
            raise model_directory.BadModel(f"--reward-pairs: {error}") from None
    reward = _reward(options, digests)
    cores = options.cores or len(os.sched_getaffinity(0))
    return Plan(
        options=options,
        policy=policy,
        policy_id=model_directory.policy_id(model_directory.model_digest(policy.path, digests)),
        reward=reward,
        judge=_judge(options, reward),
        redis=None if options.redis_url else redis_server.system_server(),
        placement=place(cores, count_gpus()),
    )


def _reward(options: Options, digests: Path) -> Reward:
    if sum(map(bool, (options.reward, options.reward_function, options.reward_config))) > 1:
        raise model_directory.BadModel("--reward, --reward-function and --reward-config: a stack has one of them")
    if options.reward_function:
        return open_function(options.reward_function, options.reward_seconds, options.environment)
    if options.reward_config is not None:
        return read_config(options.reward_config)
    path = model_directory.resolve(options.reward, "reward", SHIPPED_MODELS / "reward")
    return open_directory(path, options.max_model_len, digests)


def _judge(options: Options, reward: Reward) -> RewardFunction | RewardConfig | None:
    judge = _asked_judge(options)
    if judge is not None:
        chosen, asked = ({member.id for member in config_of(one, Path("/")).members} for one in (reward, judge))
        if chosen & asked:
            raise model_directory.BadModel("the second reward model chooses and trains too: it would say nothing new")
    return judge


def _asked_judge(options: Options) -> RewardFunction | RewardConfig | None:
    if options.judge_function and options.judge_config is not None:
        raise model_directory.BadModel("--judge-function and --judge-config: a stack has one of them")
    if options.judge_config is not None:
        return read_config(options.judge_config, "--judge-config")
    is_demo = not any((options.policy, options.reward, options.reward_function, options.reward_config))
    name = options.judge_function or (DEMO_JUDGE if is_demo else "")
    return open_function(name, options.reward_seconds, options.environment) if name else None


def count_gpus() -> int:
    """GPUs that the installed vLLM could use; 0 with its CPU build, whatever the machine holds."""
    try:
        is_cpu_build = "+cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return 0
    command = shutil.which("nvidia-smi")
    if is_cpu_build or command is None:
        return 0
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def redis_url(plan: Plan, state: StateDirectory) -> str:
    return plan.options.redis_url or f"unix://{quote(str(state.redis_socket))}"


def reward_pairs(plan: Plan) -> Path | Literal["none"] | None:
    """What the gateway is told; None leaves it to the gateway, which has pairs of its own."""
    told = plan.options.reward_pairs
    if told:
        return NO_PAIRS if told == NO_PAIRS else Path(told).resolve()
    is_shipped = isinstance(plan.reward, RewardDirectory) and plan.reward.model.path == SHIPPED_MODELS / "reward"
    return SHIPPED_MODELS.with_name("reward_pairs.json") if is_shipped else None


def bonsai_variables(plan: Plan, state: StateDirectory, port: int) -> dict[str, str]:
    """The settings of gateway and worker that this stack decides; everything else keeps its own default."""
    pairs = reward_pairs(plan)
    judge = {} if plan.judge is None else {"BONSAI_JUDGE_REWARD_MODEL": _told(plan.judge, state.judge_socket)}
    return {
        **({} if pairs is None else {"BONSAI_REWARD_PAIRS": str(pairs)}),
        **judge,
        "BONSAI_REDIS_URL": redis_url(plan, state),
        "BONSAI_POLICY_ENGINE_URLS": json.dumps([f"unix://{state.policy_socket}"]),
        "BONSAI_REWARD_MODEL": _told(plan.reward, state.reward_socket),
        "BONSAI_POLICY_DIRECTORY": str(plan.policy.path),
        "BONSAI_BASE_POLICY_ID": plan.policy_id,
        "BONSAI_MAX_MODEL_LEN": str(plan.policy.max_model_len),
        "BONSAI_ARTEFACTS": str(state.artefacts),
        "BONSAI_SPOOL": str(state.spool),
        "BONSAI_MAX_LORAS": str(plan.options.max_loras),
        "BONSAI_MAX_LORA_RANK": str(plan.max_lora_rank),
        "BONSAI_FINGERPRINT_TOLERANCE": str(engines.fingerprint_tolerance(plan.placement.policy_gpu is not None)),
        "BONSAI_HOST": plan.options.host,
        "BONSAI_PORT": str(port),
    }


def _told(reward: Reward, socket: Path) -> str:
    return config_of(reward, socket).model_dump_json()


def redis_spec(plan: Plan, state: StateDirectory) -> ProcessSpec | None:
    """None when somebody else runs Redis."""
    if plan.redis is None:
        return None
    kept = {name: value for name, value in plan.options.environment.items() if name in ("PATH", "LANG", "HOME")}
    return ProcessSpec(
        name="redis",
        argv=redis_server.server_argv(plan.redis.executable, state.redis_socket, state.redis),
        environment=kept,
        directory=state.redis,
        log=state.log("redis"),
        probe=probes.redis(redis_url(plan, state)),
        socket=state.redis_socket,
    )


def engine_specs(plan: Plan, state: StateDirectory) -> tuple[ProcessSpec, ...]:
    """The policy engine and the reward models, unless somebody else runs these."""
    rewards = (("reward", plan.reward, state.reward_socket), ("judge", plan.judge, state.judge_socket))
    specs = [_policy_spec(plan, state)]
    for name, reward, socket in rewards:
        match reward:
            case RewardFunction():
                specs.append(function_spec(name, reward, socket, state, plan.options.environment))
            case RewardDirectory():
                specs.append(_reward_spec(plan, reward, state))
    return tuple(specs)


def _policy_spec(plan: Plan, state: StateDirectory) -> ProcessSpec:
    place_of = plan.placement
    argv = engines.policy_engine_argv(
        plan.policy.path,
        plan.policy_id,
        state.policy_socket,
        max_model_len=plan.policy.max_model_len,
        max_loras=plan.options.max_loras,
        max_lora_rank=plan.max_lora_rank,
        device=_device(plan.policy, place_of.policy_gpu_share),
    )
    environment = engines.engine_environment(
        plan.options.environment, runtime=state.runtime, threads=place_of.policy_threads, gpu=place_of.policy_gpu
    )
    return _engine("policy", argv, environment, state, state.policy_socket)


def _reward_spec(plan: Plan, reward: RewardDirectory, state: StateDirectory) -> ProcessSpec:
    place_of = plan.placement
    argv = engines.reward_engine_argv(
        reward.model.path,
        reward.id,
        state.reward_socket,
        max_model_len=reward.model.max_model_len,
        device=_device(reward.model, place_of.reward_gpu_share),
    )
    environment = engines.engine_environment(
        plan.options.environment, runtime=state.runtime, threads=place_of.reward_threads, gpu=place_of.reward_gpu
    )
    return _engine("reward", argv, environment, state, state.reward_socket)


def _device(model: ModelDirectory, gpu_share: float | None) -> tuple[str, ...]:
    if gpu_share is not None:
        return engines.gpu_arguments(gpu_share)
    return engines.cpu_arguments(cache_bytes(model.cache_bytes_per_token, model.max_model_len))


def _engine(
    name: str, argv: tuple[str, ...], environment: dict[str, str], state: StateDirectory, socket: Path
) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        argv=argv,
        environment=environment,
        directory=state.root,
        log=state.log(name),
        probe=probes.engine(socket),
        socket=socket,
    )


def gateway_spec(plan: Plan, state: StateDirectory, port: int) -> ProcessSpec:
    settled = {
        "CUDA_VISIBLE_DEVICES": "",
        "BONSAI_SHUTDOWN_SECONDS": str(GATEWAY_SHUTDOWN_SECONDS),
        "BONSAI_ADMIN_KEY_FILE": str(state.admin_key),
        "BONSAI_KEY_PEPPER_FILE": str(state.key_pepper),
    }
    environment = _own_environment(plan) | bonsai_variables(plan, state, port) | settled
    return ProcessSpec(
        name="gateway",
        argv=(sys.executable, "-m", "service"),
        environment=environment,
        directory=state.root,
        log=state.log("gateway"),
        probe=probes.gateway(f"http://{url_host(plan.options.host)}:{port}", state.admin_key),
        grace_seconds=3.5,
    )


def worker_spec(plan: Plan, state: StateDirectory, port: int) -> ProcessSpec:
    threads = str(plan.placement.worker_threads)
    defaults = {"OMP_NUM_THREADS": threads, "BONSAI_TORCH_THREADS": threads}
    settled = {"REMAP_SIGTERM": "SIGQUIT", "TOKENIZERS_PARALLELISM": "false"}
    if plan.placement.worker_gpu is not None:
        settled["CUDA_VISIBLE_DEVICES"] = str(plan.placement.worker_gpu)
    celery = ("-m", "celery", "-A", "worker.app", "worker", "-c", "1")
    return ProcessSpec(
        name="worker",
        argv=(sys.executable, *celery, "--without-gossip", "--without-mingle", "--loglevel", "INFO"),
        environment=defaults | _own_environment(plan) | bonsai_variables(plan, state, port) | settled,
        directory=state.root,
        log=state.log("worker"),
        probe=probes.worker,
        niceness=WORKER_NICENESS,
        grace_seconds=3.5,
    )


def compactor_spec(plan: Plan, state: StateDirectory, port: int) -> ProcessSpec:
    return ProcessSpec(
        name="compactor",
        argv=(sys.executable, "-m", "worker.compactor"),
        environment={"OMP_NUM_THREADS": "1"} | _own_environment(plan) | bonsai_variables(plan, state, port),
        directory=state.root,
        log=state.log("compactor"),
        probe=probes.compactor,
        niceness=WORKER_NICENESS,
        grace_seconds=3.5,
    )


def _own_environment(plan: Plan) -> dict[str, str]:
    """Our own packages come from where this one does, and never from the directory a process runs in: a file of
    the user's called `worker.py` must not become our worker."""
    inherited = {name: value for name, value in plan.options.environment.items() if name not in SECRETS_OF_OURS}
    home = str(Path(bonsai.__file__).parents[1])
    paths = [home, *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
    }


def url_host(host: str) -> str:
    """How this machine reaches what listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
