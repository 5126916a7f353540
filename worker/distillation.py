"""A job from its window to its policy, each part one call: the table of contents of the worker.

Owns the order of the parts and what each is given. Does not own any part, nor the lease's end (`job_process`).
An attempt that takes a job up again finds the frozen window and the newest state, and goes on from there.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import redis
import torch

from bon_algos.contracts import (
    DEFAULT_TENANT,
    BonRegressionSpec,
    DataWindow,
    EvaluationReport,
    InterpolationSpec,
    JobSpec,
    Manifest,
)
from bon_algos.logprobs import TokenGroup
from bon_algos.steps import SequenceLogprobs
from worker import checkpoint, dataset, mixture
from worker.crew import crew
from worker.dataset import FrozenWindow, PromptPool
from worker.engine import Engines
from worker.errors import JobFailed
from worker.evaluate import (
    MAX_LOGPROB_DIFFERENCE,
    MAX_PROMPTS,
    Judged,
    fingerprint,
    kl_interval,
    logprob_difference,
    report_of,
    require_same_policy,
    samples_needed,
)
from worker.full_weights import FullPolicy
from worker.lease import Lease
from worker.ledger import groups_newest_first
from worker.loop import Loop
from worker.mixture import require_same_sampler
from worker.models import TrainedPolicy, dtype_of, open_policy
from worker.opening import TrainingPlan, begin, prepare_torch
from worker.patience import patiently
from worker.progress import Progress
from worker.publish import publish, read_published
from worker.quantile_model import learned_log_quantiles
from worker.ranks import ALONE, Parallelism, Ranks
from worker.rollouts import Rollouts, spread
from worker.train import Training

log = logging.getLogger(__name__)

SERVING_CHECK_PROMPTS = 8
MAX_SERVING_DIFFERENCE = 1e-2
"""Nats per token, mean, between logged log-probs of the reference and the trainer's: more is another model."""


@dataclass(frozen=True)
class Workplace:
    """What a job may touch; built once, at the process edge."""

    client: redis.Redis
    engines: Engines
    artefacts: Path
    policy_directory: Path
    base_policy_id: str
    device: torch.device
    torch_threads: int
    checkpoint_steps: int
    checkpoint_seconds: float
    engine_patience_seconds: float
    processes: int = 1
    """That train together."""
    parallelism: Parallelism = "data"


class Distillation:
    """One attempt at one job."""

    def __init__(self, spec: JobSpec, lease: Lease, workplace: Workplace, tenant: str = DEFAULT_TENANT) -> None:
        """tenant: whose job it is; it learns from nobody else's groups and policies."""
        self.spec = spec
        self.tenant = tenant
        self.lease = lease
        self.workplace = workplace
        self.directory = workplace.artefacts / "jobs" / lease.job_id
        attempt = f"{lease.epoch}-{secrets.token_hex(4)}"
        self.attempt = self.directory / attempt
        self.attempt.mkdir(parents=True)
        self.steps = 0 if spec.method.interpolation is not None else spec.method.algorithm.steps
        self.progress = Progress(lease, self.steps)
        self.rollouts = Rollouts(
            workplace.engines,
            directory=self.attempt,
            job_id=lease.job_id,
            attempt=attempt,
        )

    def run(self) -> None:
        """Drive the job to its end. Raises what `errors` lists."""
        window, interpolation = self.freeze(), self.spec.method.interpolation
        if interpolation is not None:
            policy = self.interpolated(interpolation)
            require_same_reference(policy, window.train)
            self.conclude(policy, window)
        else:
            with crew(self.workplace.processes, self.workplace.device.type) as ranks:
                training = self.open_training(window, ranks)
                window = self.weighed(training.policy, window)
                self.train(training, self.with_quantiles(training.policy, window))
                self.conclude(self.as_served(training.policy), window)
        checkpoint.forget(self.directory)

    def conclude(self, policy: TrainedPolicy, window: FrozenWindow) -> None:
        # Engines serve adapters: of full weights there is nothing to draw.
        report = None if isinstance(policy, FullPolicy) else self.evaluate(policy, window)
        self.publish(policy, window, report)

    def freeze(self) -> FrozenWindow:
        self.progress.enter("freezing")
        spec, place, method = self.spec, self.workplace, self.spec.method.spec
        wanted = dataset.Requirements(
            reference_policy=place.base_policy_id,
            reward_model=place.engines.reward_model_id,
            reward_template_digest=place.engines.reward_template_digest,
            num_candidates=method.candidates_needed,
            since=spec.window.since,
            until=spec.window.until,
            other_policies=spec.window.policies,
        )
        groups = groups_newest_first(place.client, spec.route, tenant=self.tenant, since=spec.window.since)
        return dataset.freeze(
            self.directory / "window",
            groups,
            wanted,
            max_groups=spec.window.max_groups,
            held_out_fraction=spec.held_out_fraction,
        )

    def open_training(self, window: FrozenWindow, ranks: Ranks = ALONE) -> Training:
        """The policy with its optimiser on every rank, where the newest state left it."""
        place, state = self.workplace, checkpoint.newest(self.directory)
        plan = TrainingPlan(
            spec=self.spec,
            policy_directory=place.policy_directory,
            base_policy_id=place.base_policy_id,
            parent_directory=self.parent_directory(),
            device_type=place.device.type,
            threads=place.torch_threads if state is None else int(state.numbers["threads"]),
            parallelism=place.parallelism,
            job_directory=self.directory,
            resumed_step=None if state is None else state.step,
        )
        training = begin(plan, state, ranks)
        if state is not None:
            self.progress.resume(state.step, state.numbers["metrics"])
            log.info("resumed at step %d", state.step)
        require_same_reference(training.policy, window.train)
        return training

    def parent_directory(self) -> Path | None:
        """Of the adapter that is trained further. Raises JobFailed for one that the method's adapter cannot hold."""
        place, method, parent_id = self.workplace, self.spec.method.algorithm, self.spec.training.start_from
        if parent_id == "base":
            return None
        parent = read_published(place.client, place.artefacts, parent_id, place.base_policy_id, self.tenant)
        if (parent.rank, parent.alpha) != (method.lora_rank, method.lora_alpha):
            raise JobFailed(
                "policy_unusable",
                f"{parent_id} has lora_rank {parent.rank} and lora_alpha {parent.alpha:g}, and the method asks for "
                f"{method.lora_rank} and {method.lora_alpha:g}: give the method the policy's",
            )
        return parent.directory

    def as_served(self, policy: TrainedPolicy) -> TrainedPolicy:
        """The policy in the precision that an engine serves it in, where it was trained in another."""
        asked, device = self.spec.training.precision, self.workplace.device
        if isinstance(policy, FullPolicy) or dtype_of(asked, device) == dtype_of(None, device):
            return policy
        method = self.spec.method.algorithm
        served = self.open_adapter(method.lora_rank, method.lora_alpha)
        served.load_factors(policy.factors)
        return served

    def weighed(self, policy: TrainedPolicy, window: FrozenWindow) -> FrozenWindow:
        """The window with candidates of other policies weighed as the reference's, where it has any."""

        def law(policy_id: str | None) -> SequenceLogprobs:
            if policy_id is None:
                return policy.reference_logprobs
            sampler = self.published(policy_id)
            require_same_sampler(sampler, policy_id, window.train, MAX_SERVING_DIFFERENCE)
            return partial(sampler.logprobs_wearing, {})

        needed = self.spec.method.algorithm.candidates_needed
        return mixture.weighed(window, law, num_candidates=needed, check=self.lease.check)

    def with_quantiles(self, policy: TrainedPolicy, window: FrozenWindow) -> FrozenWindow:
        """The window with learned quantiles, where the method wants them."""
        method = self.spec.method.algorithm
        if not isinstance(method, BonRegressionSpec) or method.quantiles == "counted":
            return window
        feature_BD = policy.prompt_features([pool.prompt_ids for pool in window.train]).cpu()
        rewards = [[one.ranking_reward for one in pool.candidates] for pool in window.train]
        learned = learned_log_quantiles(feature_BD, rewards, self.spec.seed)
        pools = zip(window.train, learned, strict=True)
        return window._replace(train=tuple(pool.model_copy(update={"log_quantiles": own}) for pool, own in pools))

    def interpolated(self, spec: InterpolationSpec) -> TrainedPolicy:
        """A finished policy some of the way back to its reference."""
        prepare_torch(self.workplace.torch_threads, self.workplace.device)
        policy = self.published(spec.policy)
        policy.interpolate(spec.share)
        return policy

    def published(self, policy_id: str) -> TrainedPolicy:
        place = self.workplace
        parent = read_published(place.client, place.artefacts, policy_id, place.base_policy_id, self.tenant)
        policy = self.open_adapter(parent.rank, parent.alpha)
        policy.load_adapter(parent.directory)
        return policy

    def open_adapter(self, rank: int, alpha: float) -> TrainedPolicy:
        """In the engine's precision, to be asked and not to be trained."""
        place = self.workplace
        return open_policy(
            place.policy_directory,
            place.base_policy_id,
            rank=rank,
            alpha=alpha,
            train_factor_a=True,
            seed=self.spec.seed,
            device=place.device,
        )

    def train(self, training: Training, window: FrozenWindow) -> None:
        self.progress.enter("training")
        self.rollouts.unload_leftovers()
        method, place = self.spec.method.algorithm, self.workplace
        loop = Loop(
            training,
            window,
            lease=self.lease,
            progress=self.progress,
            rollouts=self.rollouts,
            attempt=self.attempt,
            prompts_per_step=method.prompts_per_step,
            seed=self.spec.seed,
            checkpoint_steps=place.checkpoint_steps,
            checkpoint_seconds=place.checkpoint_seconds,
            patience_seconds=place.engine_patience_seconds,
        )
        loop.run(method.steps)
        training.finish()

    def evaluate(self, policy: TrainedPolicy, window: FrozenWindow) -> EvaluationReport:
        self.progress.enter("evaluating")
        pools = spread(window.held_out, MAX_PROMPTS)
        num_samples = samples_needed(self.spec.n)
        judged = patiently(
            lambda: self.draw_judged(policy, pools, num_samples),
            self.lease.wait,
            self.workplace.engine_patience_seconds,
        )
        difference = require_same_policy(policy, judged, MAX_LOGPROB_DIFFERENCE[self.workplace.device.type])
        log.info("engine and trainer differ by %.1e nats per token", difference)
        return report_of(judged, kl_interval(policy, judged), self.spec.n)

    def draw_judged(self, policy: TrainedPolicy, pools: Sequence[PromptPool], num_samples: int) -> list[Judged]:
        with self.rollouts.served(policy) as name:
            names = (name, self.workplace.base_policy_id)
            drawn = self.rollouts.draw([(model, pool, num_samples) for model in names for pool in pools])
        sides = zip(pools, drawn[: len(pools)], drawn[len(pools) :], strict=True)
        return [Judged(pool, own, reference) for pool, own, reference in sides]

    def publish(self, policy: TrainedPolicy, window: FrozenWindow, report: EvaluationReport | None) -> None:
        self.progress.enter("publishing")
        adapter = self.attempt / "adapter"
        if isinstance(policy, FullPolicy):
            policy.save(adapter, self.workplace.policy_directory)
            proof = None
        else:
            policy.save_adapter(adapter)
            proof = fingerprint(policy, window.held_out)
        self.lease.confirm()
        manifest = partial(self.manifest, window.data, report, policy.rank)
        record = publish(self.workplace.artefacts, adapter, proof, manifest)
        self.lease.finish_succeeded(record, "" if report is None else report.model_dump_json())

    def manifest(
        self, data: DataWindow, report: EvaluationReport | None, rank: int, digest: str, files: dict[str, str]
    ) -> Manifest:
        place = self.workplace
        return Manifest(
            tenant=self.tenant,
            policy_id=f"pol-{digest[:16]}",
            digest=digest,
            kind=self.spec.training.weights,
            base_policy_id=place.base_policy_id,
            parent_policy_id=self.parent_policy_id(),
            reward_model_id=place.engines.reward_model_id,
            job_id=self.lease.job_id,
            epoch=self.lease.epoch,
            created_at=time.time(),
            spec=self.spec,
            data=data,
            report=report,
            files=files,
            lora_rank=rank,
            steps=self.steps,
        )

    def parent_policy_id(self) -> str:
        """Whose weights these began as."""
        if self.spec.method.interpolation is not None:
            return self.spec.method.interpolation.policy
        start = self.spec.training.start_from
        return self.workplace.base_policy_id if start == "base" else start


def require_same_reference(policy: TrainedPolicy, pools: Sequence[PromptPool]) -> None:
    """Compare some logged log-probs with the trainer's own of the reference, once.

    Raises JobFailed when they are another model's: weights, tokenizer or precision differ between serving and
    training, and nothing that is learned would be what is served.
    """
    checked = [pool for pool in spread(pools, SERVING_CHECK_PROMPTS) if pool.drawn_by_reference]
    if not checked:  # other policies drew everything, and `require_same_sampler` looks at those
        return
    groups = [TokenGroup(pool.prompt_ids, [pool.drawn_by_reference[0].token_ids]) for pool in checked]
    seen = [[pool.drawn_by_reference[0].token_logprobs] for pool in checked]
    difference = logprob_difference(policy, groups, seen, reference=True)
    if not difference <= MAX_SERVING_DIFFERENCE:
        message = f"logged log-probs differ from the trainer's by {difference:.2e} nats per token"
        raise JobFailed("train_serve_mismatch", f"{message}; at most {MAX_SERVING_DIFFERENCE:.0e} is rounding")
