"""A job from its window to its policy, each part one call: the table of contents of the worker.

Owns the order of the parts and what each is given. Does not own any part, nor the lease's end (`job_process`).
An attempt that takes a job up again finds the frozen window and the newest state, and goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import redis
import torch

from archive.reading import Archive
from bon_algos.acceptance import Requirements
from bon_algos.algorithms import make_step
from bon_algos.contracts import (
    DEFAULT_TENANT,
    BonRegressionSpec,
    CandidateGroup,
    FileId,
    InterpolationSpec,
    JobSpec,
    Manifest,
    PolicyId,
    PolicyReport,
)
from bon_algos.logprobs import TokenGroup
from bon_algos.order import mean_interval
from bon_algos.scoring import Completion, Score
from bon_algos.steps import OnPolicyStep, SequenceLogprobs
from worker import attempts, checkpoint, dataset, erased_windows, mixture, uploads
from worker.dataset import FrozenWindow, PromptPool
from worker.engine import Engines
from worker.erasures import Erasures
from worker.errors import JobFailed
from worker.evaluate import (
    MAX_LOGPROB_DIFFERENCE,
    MAX_PROMPTS,
    Judged,
    fingerprint,
    kl_by_prompt,
    logprob_difference,
    report_of,
    require_same_policy,
    samples_needed,
)
from worker.job_process import read_tokenizer
from worker.judge import second_opinion
from worker.lease import Lease
from worker.ledger import feedback_on, groups_newest_first
from worker.lineage import lineage
from worker.loop import Loop
from worker.mixture import require_same_sampler
from worker.models import TrainedPolicy, open_policy
from worker.patience import patiently
from worker.progress import Progress
from worker.publish import publish, read_published
from worker.quantile_model import learned_log_quantiles
from worker.report import Evidence, Subject, held_out, policy_report
from worker.report_files import write_report
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
    judge: Engines | None
    """The second reward model's, for the report."""
    artefacts: Path
    policy_directory: Path
    base_policy_id: str
    device: torch.device
    torch_threads: int
    checkpoint_steps: int
    checkpoint_seconds: float
    engine_patience_seconds: float
    archive: Archive
    """Where groups are that the stream has no more."""


class Distillation:
    """One attempt at one job."""

    def __init__(self, spec: JobSpec, lease: Lease, workplace: Workplace, tenant: str = DEFAULT_TENANT) -> None:
        """tenant: whose job it is; it learns from nobody else's groups and policies."""
        self.spec = spec
        self.tenant = tenant
        self.lease = lease
        self.workplace = workplace
        self.directory = workplace.artefacts / "jobs" / lease.job_id
        self.attempt = attempts.begin(self.directory, lease.epoch)
        self.steps = 0 if spec.method.interpolation is not None else spec.method.algorithm.steps
        self.progress = Progress(lease, self.steps)
        self.tokens_trained = 0
        self.rollouts = Rollouts(
            workplace.engines,
            directory=self.attempt,
            job_id=lease.job_id,
            attempt=self.attempt.name,
        )

    def run(self) -> None:
        """Drive the job to its end. Raises what `errors` lists."""
        window, interpolation = self.freeze(), self.spec.method.interpolation
        if interpolation is None:
            training = self.open_training(window)
            window = self.weighed(training.policy, window)
            self.train(training, self.with_quantiles(training.policy, window))
            policy = training.policy
        else:
            policy = self.interpolated(interpolation)
            require_same_reference(policy, window.train)
        evidence = self.evaluate(policy, window)
        self.publish(policy, window, evidence)
        attempts.forget(self.directory)

    def freeze(self) -> FrozenWindow:
        self.progress.enter("freezing")
        spec, place = self.spec, self.workplace
        groups = self.groups() if spec.training_file is None else self.uploaded(spec.training_file)
        self.lineage = lineage(place.client, place.artefacts, (self.parent_policy_id, *spec.window.policies))
        erasures = Erasures.read(place.client)
        window = dataset.freeze(
            self.directory / "window",
            (group for group in groups if not erasures.cover(group)),
            self.wanted(),
            max_groups=spec.window.max_groups,
            held_out_fraction=spec.held_out_fraction,
            feedback_of=partial(feedback_on, place.client),
            training_file=spec.training_file,
            trained_before=self.lineage.trained,
            within=self.attempt,
        )
        # Asked for since then: the eraser may have looked for windows before this one was there.
        if Erasures.read(place.client).concern(self.directory / "window"):
            raise JobFailed(erased_windows.CODE, erased_windows.MESSAGE)
        return window

    @property
    def parent_policy_id(self) -> PolicyId:
        """Whose weights the job begins with."""
        interpolation = self.spec.method.interpolation
        return self.workplace.base_policy_id if interpolation is None else interpolation.policy

    def wanted(self) -> Requirements:
        place = self.workplace
        return Requirements.of(
            self.spec,
            reference_policy=place.base_policy_id,
            reward_model=place.engines.reward_model_id,
            reward_template_digest=place.engines.reward_template_digest,
        )

    def groups(self) -> Iterator[CandidateGroup]:
        """Of the ledger."""
        spec, place = self.spec, self.workplace
        routes = spec.window.routes or (spec.route,)
        return groups_newest_first(
            place.client, routes, tenant=self.tenant, since=spec.window.since, archive=place.archive
        )

    def uploaded(self, file_id: FileId) -> Iterator[CandidateGroup]:
        """Of a file, which is looked for only where there is no frozen window yet."""
        place = self.workplace
        record = uploads.read_record(place.client, self.tenant, file_id)
        path, tokenizer = uploads.checked_path(place.artefacts, record), read_tokenizer(place.policy_directory)

        def score(completions: Sequence[Completion]) -> Sequence[Score]:
            waiting = (self.lease.wait, place.engine_patience_seconds)
            return patiently(lambda: place.engines.score(completions), *waiting)

        yield from uploads.groups_of(path, record, self.wanted(), tokenizer, score, self.spec.window.max_groups)

    def open_training(self, window: FrozenWindow) -> Training:
        """The policy with its optimiser, where the newest state left it."""
        method, place = self.spec.method.algorithm, self.workplace
        step = make_step(method)
        state = checkpoint.newest(self.directory)
        threads = place.torch_threads if state is None else int(state.numbers["threads"])
        prepare_torch(threads, place.device)
        policy = open_policy(
            place.policy_directory,
            place.base_policy_id,
            rank=method.lora_rank,
            alpha=method.lora_alpha,
            # An average of B is an average of B·A only while A stands still.
            train_factor_a=not isinstance(step, OnPolicyStep),
            seed=self.spec.seed,
            device=place.device,
        )
        training = Training(
            policy,
            step,
            steps=method.steps,
            learning_rate=method.learning_rate,
            warmup_steps=method.warmup_steps,
            max_grad_norm=method.max_grad_norm,
            seed=self.spec.seed,
        )
        if state is not None:
            training.resume(state)
            self.progress.resume(state.step, state.numbers["metrics"])
            log.info("resumed at step %d", state.step)
        require_same_reference(policy, window.train)
        return training

    def weighed(self, policy: TrainedPolicy, window: FrozenWindow) -> FrozenWindow:
        """The window with candidates of other policies weighed as the reference's, where it has any."""
        is_any_law = self.wanted().is_any_law
        if self.spec.training_file is not None:
            window = uploads.with_reference_logprobs(
                window, policy.reference_logprobs, self.lease.check, is_any_law=is_any_law
            )
        if is_any_law:
            return window

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
        policy = open_policy(
            place.policy_directory,
            place.base_policy_id,
            rank=parent.rank,
            alpha=parent.alpha,
            train_factor_a=True,
            seed=self.spec.seed,
            device=place.device,
        )
        policy.load_adapter(parent.directory)
        return policy

    def train(self, training: Training, window: FrozenWindow) -> None:
        self.progress.enter("training")
        method, place = self.spec.method.algorithm, self.workplace
        self.rollouts.unload_leftovers(partial(attempts.has_ended, place.client))
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
            evaluation_samples=2 * samples_needed(self.spec.n) * min(MAX_PROMPTS, len(window.held_out)),
        )
        loop.run(method.steps)
        self.tokens_trained = training.tokens
        training.finish()

    def evaluate(self, policy: TrainedPolicy, window: FrozenWindow) -> Evidence:
        self.progress.enter("evaluating")
        place = self.workplace
        pools = spread(window.held_out, MAX_PROMPTS)
        num_samples = samples_needed(self.spec.n)
        judged = patiently(
            lambda: self.draw_judged(policy, pools, num_samples),
            self.lease.wait,
            place.engine_patience_seconds,
        )
        difference = require_same_policy(policy, judged, MAX_LOGPROB_DIFFERENCE[place.device.type])
        log.info("engine and trainer differ by %.1e nats per token", difference)
        kl_B = kl_by_prompt(policy, judged)
        opinion = second_opinion(place.judge, judged, self.lease.wait, place.engine_patience_seconds)
        return Evidence(judged, kl_B, report_of(judged, mean_interval(kl_B), self.spec.n), opinion)

    def draw_judged(self, policy: TrainedPolicy, pools: Sequence[PromptPool], num_samples: int) -> list[Judged]:
        with self.rollouts.served(policy) as name:
            names = (name, self.workplace.base_policy_id)
            drawn = self.rollouts.draw([(model, pool, num_samples) for model in names for pool in pools])
        sides = zip(pools, drawn[: len(pools)], drawn[len(pools) :], strict=True)
        return [Judged(pool, own, reference) for pool, own, reference in sides]

    def publish(self, policy: TrainedPolicy, window: FrozenWindow, evidence: Evidence) -> None:
        self.progress.count(trained=self.tokens_trained, sampled=self.rollouts.tokens, evaluation_seconds=None)
        self.progress.enter("publishing")
        adapter = self.attempt / "adapter"
        policy.save_adapter(adapter)
        proof = fingerprint(policy, window.held_out)
        manifest = partial(self.manifest, window, evidence, policy.rank)
        record = publish(self.workplace.artefacts, adapter, proof, manifest, self.lease.confirm)
        self.lease.finish_succeeded(record, evidence.summary.model_dump_json())

    def manifest(
        self, window: FrozenWindow, evidence: Evidence, rank: int, digest: str, files: dict[str, str]
    ) -> Manifest:
        """The manifest, and the whole report that it names, which is written first."""
        place, created_at = self.workplace, time.time()
        report = self.report(f"pol-{digest[:16]}", window, evidence, created_at)
        return Manifest(
            tenant=self.tenant,
            policy_id=report.policy_id,
            digest=digest,
            base_policy_id=place.base_policy_id,
            parent_policy_id=self.parent_policy_id,
            reward_model_id=place.engines.reward_model_id,
            job_id=self.lease.job_id,
            epoch=self.lease.epoch,
            created_at=created_at,
            spec=self.spec,
            data=window.data,
            report=evidence.summary,
            files=files,
            report_files=write_report(place.artefacts, report),
            lora_rank=rank,
            steps=self.steps,
        )

    def report(self, policy_id: PolicyId, window: FrozenWindow, evidence: Evidence, created_at: float) -> PolicyReport:
        place, spec = self.workplace, self.spec
        about = Subject(
            policy_id=policy_id,
            base_policy_id=place.base_policy_id,
            parent_policy_id=self.parent_policy_id,
            job_id=self.lease.job_id,
            route=spec.route,
            method=spec.method.type,
            created_at=created_at,
            seed=spec.seed,
            n=spec.n,
            reward_model_id=place.engines.reward_model_id,
            reward_members=place.engines.num_reward_members,
        )
        trained = self.lineage.trained | {pool.prompt_ids for pool in window.train}
        prompts = held_out(evidence.judged, trained, self.lineage.ancestors, self.lineage.unknown)
        return policy_report(about, prompts, evidence)


def prepare_torch(threads: int, device: torch.device) -> None:
    """Make a step repeatable: sums split over the same threads, kernels chosen the same way."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")


def require_same_reference(policy: TrainedPolicy, pools: Sequence[PromptPool]) -> None:
    """Compare some logged log-probs with the trainer's own of the reference, once.

    Raises JobFailed when they are another model's: weights, tokenizer or precision differ between serving and
    training, and nothing that is learned would be what is served.
    """
    drawn = [(pool, one) for pool in spread(pools, SERVING_CHECK_PROMPTS) for one in pool.drawn_by_reference[:1]]
    checked = [(pool, one) for pool, one in drawn if one.token_logprobs]
    if not checked:  # a file does not tell, or others drew everything, and `require_same_sampler` looks at those
        return
    groups = [TokenGroup(pool.prompt_ids, [one.token_ids]) for pool, one in checked]
    seen = [[one.token_logprobs] for _, one in checked]
    difference = logprob_difference(policy, groups, seen, reference=True)
    if not difference <= MAX_SERVING_DIFFERENCE:
        message = f"logged log-probs differ from the trainer's by {difference:.2e} nats per token"
        raise JobFailed("train_serve_mismatch", f"{message}; at most {MAX_SERVING_DIFFERENCE:.0e} is rounding")
