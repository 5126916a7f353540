"""Distillations of the demo's model in this process: fed as the worker feeds them, judged, and kept.

Owns feeding a training from the ledger and with fresh samples, which targets a regression has, full fine-tuning, and
running many jobs on all cores. Does not own the steps (`bon_algos`), the training (`worker.train`), learned targets
(`model_targets`) nor the measures (`model_lab`).

Dimension key:  B prompts · N candidates per prompt
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.papers import digests, model_lab, model_targets
from benchmarks.papers.model_lab import Bench, Draws, Judged, Ledger, Part, judge, order_of, plain_model
from bon_algos.algorithms import make_step
from bon_algos.contracts import BonRegressionSpec, Method
from bon_algos.contracts.record import Record
from bon_algos.logprobs import TokenGroup
from bon_algos.quantiles import log_tilt_tie_aware, standing_among_others
from bon_algos.steps import (
    BondStep,
    FreshGroup,
    LoggedGroup,
    LoggedStep,
    OnPolicyStep,
    RankedGroup,
    SampledStep,
)
from worker.full_weights import FullPolicy
from worker.models import ADAPTER_NAME, TrainedPolicy, open_policy
from worker.quantile_model import learned_log_quantiles
from worker.train import Training, batch_of

CPU = torch.device("cpu")
JUDGED_DRAWS: Final = 16
"""64 prompts × 16 leave a standard error of .025 in a ratio to the frontier's KL."""


class Sizes(NamedTuple):
    train_prompts: int
    train_draws: int
    held_out_prompts: int
    held_out_draws: int

    @property
    def train_parts(self) -> list[Part]:
        return model_lab.parts_of("train", self.train_prompts, self.train_draws)

    @property
    def held_out_parts(self) -> list[Part]:
        return model_lab.parts_of("held_out", self.held_out_prompts, self.held_out_draws)


class Job(Record):
    """One training and where it is judged."""

    method: Method
    seed: int
    all_weights: bool = False
    """Full fine-tuning; otherwise LoRA."""
    candidates: int | None = None
    """Of each prompt: only so many of the ledger's are learned from."""
    targets: Literal["counted", "pooled", "learned"] = "counted"
    """Of a regression: from the candidates learned from, from all that are logged, or from a learned law of rewards."""
    judgements: int = 1
    """Evenly spread over the steps; the last one after the last."""
    judged_draws: int = JUDGED_DRAWS
    """Of each held-out prompt."""


# --- the policy ------------------------------------------------------------------------------------------


def weights_of(policy: TrainedPolicy, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The plain model's weights that make this policy, or the one with some factors replaced; copied."""
    factors = {**policy.factors, **(replaced or {})}
    if isinstance(policy, FullPolicy):
        return factors
    config = policy.model.peft_config[ADAPTER_NAME]
    weights = {}
    for name, factor_a in factors.items():
        if ".lora_A." in name:
            module, factor_b = name.split(".lora_A.")[0], factors[name.replace(".lora_A.", ".lora_B.")]
            base = policy.model.get_parameter(f"{module}.base_layer.weight").detach()
            plain = module.removeprefix("base_model.model.")
            weights[f"{plain}.weight"] = base + config.lora_alpha / config.r * (factor_b @ factor_a)
    return weights


# --- feeding ---------------------------------------------------------------------------------------------


class Feeder:
    """What a training learns from: the ledger's groups, and samples of the policy as it is."""

    def __init__(self, bench: Bench, ledger: Ledger, job: Job) -> None:
        self._bench, self._job = bench, job
        self._ahead: list[RankedGroup] = []
        part = slice(job.candidates)
        self._draws = draws = ledger.draws.part(range(len(ledger.draws.prompts)), part)
        order_BM = draws.order
        self.groups = [
            LoggedGroup(
                TokenGroup(draws.prompt_ids[b], draws.completion_ids[b]),
                order_BM[b].tolist(),
                ledger.logprob[b, part].tolist(),
            )
            for b in range(len(draws.prompts))
        ]

    def batch(self, number: int) -> list[int]:
        size = self._job.method.algorithm.prompts_per_step
        return batch_of(range(len(self.groups)), number, size=size, seed=self._job.seed)

    def learn(self, training: Training) -> None:
        """One step; fresh samples of one policy are drawn before the step before, as the worker draws them."""
        number, step = training.done, training.step
        if training.logged_step is not None:
            training.learn_logged([self.groups[b] for b in self.batch(number)])
        elif isinstance(step, OnPolicyStep):
            training.learn_fresh(self._fresh(training, step.anchor_samples))
        else:
            assert isinstance(step, BondStep | SampledStep)
            groups = self._ahead or self._ranked(training, number, step.samples_per_prompt)
            self._ahead = self._ranked(training, number + 1, step.samples_per_prompt)
            training.learn_ranked(groups)

    def _drawn(self, weights: Mapping[str, Tensor], batch: Sequence[int], count: int, *key: object) -> Draws:
        prompts = [self._draws.prompts[b] for b in batch]
        seed = random.Random(f"{self._job.seed}/{key}").getrandbits(32)
        return self._bench.draw(self._bench.wearing(weights), prompts, count, seed)

    def _ranked(self, training: Training, number: int, count: int) -> list[RankedGroup]:
        batch, weights = self.batch(number), weights_of(training.policy)
        drawn = self._drawn(weights, batch, count, number)
        logprob_BN = self._bench.logprobs(self._bench.wearing(weights), drawn)
        order_BN, logged_BM = order_of(drawn, self._draws.part(batch))
        return [
            RankedGroup(
                self.groups[b]._replace(rewards=logged_BM[row].tolist()),
                drawn.completion_ids[row],
                order_BN[row].tolist(),
                logprob_BN[row].tolist(),
                drawn.reward[row].tolist(),
            )
            for row, b in enumerate(batch)
        ]

    def _fresh(self, training: Training, anchor_samples: int) -> list[FreshGroup]:
        anchor, batch = training.anchor, self.batch(training.done)
        assert anchor is not None
        own = self._drawn(weights_of(training.policy), batch, 1, training.done)
        anchors = self._drawn(
            weights_of(training.policy, anchor.tensors), batch, anchor_samples, training.done, "anchor"
        )
        own_B1, anchor_BM = order_of(own, anchors)
        return [
            FreshGroup(
                own.prompt_ids[row],
                own.completion_ids[row][0],
                float(own_B1[row, 0]),
                anchors.completion_ids[row],
                anchor_BM[row].tolist(),
            )
            for row in range(len(batch))
        ]


def train(bench: Bench, ledger: Ledger, job: Job, look: Callable[[TrainedPolicy, int], None]) -> None:
    """Train, and have the policy looked at `job.judgements` times, the last time when it is finished."""
    spec, feeder = job.method.algorithm, Feeder(bench, ledger, job)
    step = make_step(spec) if job.targets == "counted" else _targeted(bench, ledger, job)
    if job.all_weights:
        policy: TrainedPolicy = FullPolicy(plain_model())
    else:
        policy = open_policy(
            model_lab.POLICY,
            "base",
            rank=spec.lora_rank,
            alpha=spec.lora_alpha,
            # An average of B is an average of B·A only while A stands still.
            train_factor_a=not isinstance(step, OnPolicyStep),
            seed=job.seed,
            device=CPU,
        )
    training = Training(
        policy,
        step,
        steps=spec.steps,
        learning_rate=spec.learning_rate,
        warmup_steps=spec.warmup_steps,
        max_grad_norm=spec.max_grad_norm,
        seed=job.seed,
    )
    marks = {spec.steps * number // job.judgements for number in range(1, job.judgements)}
    while training.done < spec.steps:
        feeder.learn(training)
        if training.done in marks:
            look(policy, training.done)
    training.finish()
    look(policy, spec.steps)


def _targeted(bench: Bench, ledger: Ledger, job: Job) -> LoggedStep:
    """A regression whose targets do not come from the rewards of the candidates learned from alone."""
    spec, draws = job.method.algorithm, ledger.draws
    assert isinstance(spec, BonRegressionSpec)
    order_BN = torch.from_numpy(draws.order)
    if job.targets == "pooled":
        log_tilt_BN = log_tilt_tie_aware(standing_among_others(order_BN), spec.n)[:, : job.candidates]
    else:
        rewards = order_BN[:, : job.candidates].tolist()
        learned = learned_log_quantiles(bench.features(draws.prompts), rewards, job.seed)
        log_tilt_BN = math.log(spec.n) + (spec.n - 1) * torch.tensor(learned, dtype=torch.float64)
    return model_targets.targeted_step(spec, draws.prompt_ids, log_tilt_BN)


# --- many jobs -------------------------------------------------------------------------------------------


_RESULT = TypeAdapter(list[Judged])


@cache
def _bench() -> Bench:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # of loading weights: two processes would write over the display
    return Bench()


@cache
def _reference(sizes: Sizes, directory: Path) -> Draws:
    return model_lab.read_draws(_bench(), sizes.held_out_parts, directory)


@cache
def _ledger(sizes: Sizes, directory: Path) -> Ledger:
    return model_lab.read_ledger(_bench(), sizes.train_parts, directory)


def _build(part: Part, directory: Path) -> None:
    model_lab.build_part(_bench(), part, directory)


def _run(job: Job, sizes: Sizes, directory: Path, file: Path) -> None:
    """Train and judge a job whose result is not kept yet."""
    bench, reference = _bench(), _reference(sizes, directory)
    found: list[Judged] = []

    def look(policy: TrainedPolicy, step: int) -> None:
        seed = random.Random(f"{job.seed}/judged").getrandbits(32)
        weights = weights_of(policy)
        found.append(judge(bench, weights, reference, draws=job.judged_draws, seed=seed, step=step))

    train(bench, _ledger(sizes, directory), job, look)
    aside = file.with_suffix(".part")
    aside.write_bytes(_RESULT.dump_json(found, indent=1))
    aside.rename(file)


def results(
    jobs: Sequence[Job], sizes: Sizes, directory: Path, tell: Callable[[float], None]
) -> dict[Job, list[Judged]]:
    """What every job came to, from an earlier run of the same code or from now; two at a time on two cores."""
    directory = directory / _models_digest()
    parts = [*sizes.train_parts, *sizes.held_out_parts]
    builds = [partial(_build, part, directory) for part in parts if not part.file(directory).exists()]
    files = {job: _result_file(job, sizes, directory) for job in jobs}
    runs = [partial(_run, job, sizes, directory, file) for job, file in files.items() if not file.exists()]
    for calls, share in ((builds, 0.1), (runs, 1.0)):
        if calls:
            _in_processes(calls, lambda done, share=share: tell(done * share))  # type: ignore[misc]
    return {job: _RESULT.validate_json(file.read_bytes()) for job, file in files.items()}


def reference(sizes: Sizes, directory: Path) -> Draws:
    """The held-out draws of the reference, which `results` built."""
    return _reference(sizes, directory / _models_digest())


def _in_processes(calls: Sequence[Callable[[], None]], tell: Callable[[float], None]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(multiprocessing.cpu_count(), context, initializer=_end_with_parent) as pool:
        for done, future in enumerate(as_completed([pool.submit(call) for call in calls]), start=1):
            future.result()
            tell(done / len(calls))


def _end_with_parent() -> None:
    """A run that is killed would leave its processes behind, waiting for calls that never come."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result_file(job: Job, sizes: Sizes, directory: Path) -> Path:
    key = f"{_code_digest()}/{sizes}/{job.model_dump_json(exclude_none=True)}"
    return directory / f"{job.method.type}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@cache
def _models_digest() -> str:
    return digests.of_files([folder / "model.safetensors" for folder in (model_lab.POLICY, model_lab.REWARD)])


def _code_digest() -> str:
    """Of all that a result depends on besides the models."""
    return digests.of_training(model_lab.__file__, model_targets.__file__, __file__)
