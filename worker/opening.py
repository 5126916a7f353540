"""How a job's training begins: the policy it asks for with its optimiser, where the newest state left it.

Owns the way from a plan to a training, on every rank alike. Does not own where a plan comes from (`distillation`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import torch

from bon_algos.algorithms import make_step
from bon_algos.contracts import JobSpec
from bon_algos.contracts.record import Record
from bon_algos.steps import OnPolicyStep
from worker import checkpoint
from worker.checkpoint import TrainingState
from worker.full_weights import open_full_policy
from worker.models import TrainedPolicy, open_policy
from worker.ranks import ALONE, Parallelism, Ranks
from worker.train import Training


class TrainingPlan(Record):
    """What every rank needs to know to begin."""

    spec: JobSpec
    policy_directory: Path
    base_policy_id: str
    parent_directory: Path | None
    """Of the adapter that the policy begins with; None: a new one."""
    device_type: Literal["cpu", "cuda"]
    threads: int
    parallelism: Parallelism
    job_directory: Path
    resumed_step: int | None
    """Of the state in the job's directory that is taken up; None: there is none."""


BEGIN: Final = "begin"


def begin(plan: TrainingPlan, state: TrainingState | None, ranks: Ranks) -> Training:
    """Open the plan's training on this rank, the first, and on all others."""
    with ranks.tells(BEGIN, plan.model_dump(mode="json")):
        return open_training(plan, state, ranks)


def open_training(plan: TrainingPlan, state: TrainingState | None, ranks: Ranks) -> Training:
    """The policy with its optimiser, where the state left it."""
    method, setup = plan.spec.method.algorithm, plan.spec.training
    prepare_torch(plan.threads, torch.device(plan.device_type))
    training = Training(
        open_as_planned(plan, ranks),
        make_step(method),
        steps=method.steps,
        learning_rate=method.learning_rate,
        warmup_steps=method.warmup_steps,
        max_grad_norm=method.max_grad_norm,
        seed=plan.spec.seed,
        accumulation=setup.accumulation,
        ranks=ranks,
    )
    if state is not None:
        training.resume(state)
    return training


def open_as_planned(plan: TrainingPlan, ranks: Ranks) -> TrainedPolicy:
    method, setup = plan.spec.method.algorithm, plan.spec.training
    device, spread_over = torch.device(plan.device_type), ranks if plan.parallelism == "fsdp" else ALONE
    if setup.weights == "full":
        return open_full_policy(
            plan.policy_directory,
            device=device,
            precision=setup.precision,
            gradient_checkpointing=setup.gradient_checkpointing,
            ranks=spread_over,
        )
    policy = open_policy(
        plan.policy_directory,
        plan.base_policy_id,
        rank=method.lora_rank,
        alpha=method.lora_alpha,
        # An average of B is an average of B·A only while A stands still.
        train_factor_a=not isinstance(make_step(method), OnPolicyStep),
        seed=plan.spec.seed,
        device=device,
        precision=setup.precision,
        gradient_checkpointing=setup.gradient_checkpointing,
        ranks=spread_over,
    )
    if plan.parent_directory is not None:
        policy.load_adapter(plan.parent_directory)
        if setup.reference == "start":
            policy.refer_to_start()
    return policy


def state_of(plan: TrainingPlan) -> TrainingState | None:
    """The state that rank 0 takes up. ValueError when another is the newest by now: the attempt is over."""
    if plan.resumed_step is None:
        return None
    state = checkpoint.newest(plan.job_directory)
    if state is None or state.step != plan.resumed_step:
        raise ValueError(f"the state of step {plan.resumed_step} is not the newest any more")
    return state


def prepare_torch(threads: int, device: torch.device) -> None:
    """Make a step repeatable: sums split over the same threads, kernels chosen the same way."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
