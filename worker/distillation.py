"""A job from its window to its policy, each part one call: the table of contents of the worker.

Owns the order of the parts and what each is given. Does not own any part, nor the lease's end (`job_process`).
An attempt that takes a job up again finds the frozen window and the newest state, and goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from bon_algos.acceptance import Requirements
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
from bon_algos.order import mean_interval
from bon_algos.scoring import Completion, Score
from bon_algos.steps import SequenceLogprobs
from worker import attempts, checkpoint, dataset, erased_windows, mixture, uploads
from worker.crew import crew
from worker.dataset import FrozenWindow
from worker.erasures import Erasures
from worker.errors import JobFailed
from worker.evaluate import (
    MAX_LOGPROB_DIFFERENCE,
    MAX_PROMPTS,
    fingerprint,
    kl_by_prompt,
    report_of,
    require_same_policy,
    samples_needed,
)
from worker.full_weights import FullPolicy
from worker.job_process import read_tokenizer
from worker.judge import second_opinion
from worker.judged_draws import Drawing, draw_judged
from worker.lease import Lease
from worker.ledger import feedback_on, groups_newest_first
from worker.lineage import lineage
from worker.loop import Loop
from worker.mixture import require_same_sampler
from worker.models import TrainedPolicy, dtype_of, open_policy
from worker.opening import TrainingPlan, begin, prepare_torch
from worker.patience import patiently
from worker.progress import Progress
from worker.publish import publish, read_published
from worker.quantile_model import with_learned_quantiles
from worker.ranks import ALONE, Ranks
from worker.report import Evidence, Subject, held_out, policy_report
from worker.report_files import write_report
from worker.rollouts import Rollouts, spread
from worker.serving_check import MAX_SERVING_DIFFERENCE, require_same_reference
from worker.train import Training
from worker.workplace import Workplace

log = logging.getLogger(__name__)


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
        attempts.forget(self.directory)

    def conclude(self, policy: TrainedPolicy, window: FrozenWindow) -> None:
        self.publish(policy, window, self.evaluate(policy, window))

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
            check=self.require_nothing_erased,
        )
        self.require_nothing_erased(self.directory / "window")
        return window

    def require_nothing_erased(self, window: Path) -> None:
        """Raises JobFailed for what was asked to be erased since the groups were read, or the window was frozen."""
        if Erasures.read(self.workplace.client).concern(window):
            raise JobFailed(erased_windows.CODE, erased_windows.MESSAGE)

    @property
    def parent_policy_id(self) -> PolicyId:
        """Whose weights the job begins with."""
        interpolation, start = self.spec.method.interpolation, self.spec.training.start_from
        if interpolation is not None:
            return interpolation.policy
        return self.workplace.base_policy_id if start == "base" else start

    def wanted(self) -> Requirements:
        place = self.workplace
        return Requirements.of(
            self.spec,
            base_policy=place.base_policy_id,
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
        if policy.start is not None:
            served.load_factors(policy.start)
            served.refer_to_start()
        served.load_factors(policy.factors)
        return served

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
        if not isinstance(method, BonRegressionSpec) or method.learned is None:
            return window

        def features(sequences: Sequence[Sequence[int]]) -> Tensor:
            return policy.sequence_features(sequences).cpu()

        train = with_learned_quantiles(window.train, features, method.learned, n=method.n, seed=self.spec.seed)
        return window._replace(train=train)

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
        drawing = Drawing(self.rollouts, place.base_policy_id, place.policy_directory, self.spec.seed, self.lease.check)
        judged = patiently(
            lambda: draw_judged(policy, pools, num_samples, drawing, has_all_draws=self.wanted().takes_all_draws),
            self.lease.wait,
            place.engine_patience_seconds,
        )
        if policy.is_adapter:
            difference = require_same_policy(policy, judged, MAX_LOGPROB_DIFFERENCE[place.device.type])
            log.info("engine and trainer differ by %.1e nats per token", difference)
        kl_B = kl_by_prompt(judged, policy.reference_logprobs)
        drift = None if policy.start is None else mean_interval(kl_by_prompt(judged, policy.base_logprobs))
        opinion = second_opinion(place.judge, judged, self.lease.wait, place.engine_patience_seconds)
        return Evidence(judged, kl_B, report_of(judged, mean_interval(kl_B), self.spec.n, drift), opinion)

    def publish(self, policy: TrainedPolicy, window: FrozenWindow, evidence: Evidence) -> None:
        self.progress.count(trained=self.tokens_trained, sampled=self.rollouts.tokens, evaluation_seconds=None)
        self.progress.enter("publishing")
        adapter = self.attempt / "adapter"
        if isinstance(policy, FullPolicy):
            policy.save(adapter, self.workplace.policy_directory)
            proof = None
        else:
            policy.save_adapter(adapter)
            proof = fingerprint(policy, window.held_out)
        manifest = partial(self.manifest, window, evidence, policy.rank)
        record = publish(self.workplace.artefacts, adapter, proof, manifest, self.lease.confirm)
        self.lease.finish_succeeded(record, evidence.summary.model_dump_json())

    def manifest(
        self, window: FrozenWindow, evidence: Evidence, rank: int, digest: str, files: dict[str, str]
    ) -> Manifest:
        """The manifest, and the whole report that it names, which is written first."""
        place, created_at, policy_id = self.workplace, time.time(), f"pol-{digest[:16]}"
        written = write_report(place.artefacts, self.report(policy_id, window, evidence, created_at))
        return Manifest(
            tenant=self.tenant,
            policy_id=policy_id,
            digest=digest,
            kind=self.spec.training.weights,
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
            report_files=written,
            lora_rank=rank,
            steps=self.steps,
        )

    def report(self, policy_id: PolicyId, window: FrozenWindow, evidence: Evidence, created_at: float) -> PolicyReport:
        place, spec = self.workplace, self.spec
        about = Subject(
            policy_id=policy_id,
            kind=spec.training.weights,
            base_policy_id=place.base_policy_id,
            parent_policy_id=self.parent_policy_id,
            reference_policy_id=spec.reference_policy(place.base_policy_id),
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
        return policy_report(
            about, held_out(evidence.judged, trained, self.lineage.ancestors, self.lineage.unknown), evidence
        )
