"""The training loop: a batch, a loss, a step, and a state that can be taken up again. Knows no algorithm.

Owns the order of prompts, the optimiser and what a checkpoint contains. Does not own losses (`bon_algos`),
samples (`rollouts`), files (`checkpoint`) or reporting: they are passed in.
Several ranks make a step together (`ranks`): each goes through its share of the groups, and all end with one gradient.

Everything that decides a step (its prompts, its learning rate) is a function of the seed and the number of the
step, so a run that was interrupted makes the same steps as one that was not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bon_algos.anchor import EmaAnchor
from bon_algos.logprobs import TokenGroup
from bon_algos.prefix_values import PrefixCritic
from bon_algos.steps import (
    BondStep,
    ChosenGroup,
    FreshGroup,
    GuidedGroup,
    LoggedGroup,
    LoggedStep,
    OfflineBondStep,
    OnPolicyStep,
    RankedGroup,
    SampledStep,
    ScoredGroup,
    SequenceLogprobs,
    Step,
    StepLoss,
    TokenBondStep,
    WeighedGroup,
)
from bon_algos.token_bond import GuidedTerms
from bon_algos.token_kl import TokenTerms
from worker.checkpoint import TrainingState
from worker.descent import Descent
from worker.errors import JobFailed
from worker.models import TrainedPolicy
from worker.passes import TRAINING_ROWS_TOKENS, Plan, Rehearsal
from worker.ranks import ALONE, Ranks, together
from worker.sharding import like, local, part_like, whole

Item = TypeVar("Item")
Chosen = TypeVar("Chosen", ChosenGroup, WeighedGroup, ScoredGroup, GuidedGroup)


def batch_of(items: Sequence[Item], step: int, *, size: int, seed: int) -> list[Item]:
    """The items of a step: rounds over all of them, each in an order of its own, cut into batches.

    A round that does not end with a whole batch is continued by the next, so with fewer items than `size` one
    batch holds an item more than once.
    """
    first = step * size
    return [
        items[_order(len(items), place // len(items), seed)[place % len(items)]] for place in range(first, first + size)
    ]


def _order(num_items: int, round_number: int, seed: int) -> list[int]:
    order = list(range(num_items))
    random.Random(f"{seed}/{round_number}").shuffle(order)
    return order


class Critic(NamedTuple):
    """Of prefixes, in training beside a policy."""

    values: PrefixCritic
    descent: Descent
    probe_descent: Descent
    """Of its probe, which learns with the policy."""


def opened_critic(policy: TrainedPolicy, seed: int) -> PrefixCritic:
    """That knows nothing yet; nobody else's random numbers are used up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PrefixCritic(policy.hidden_size).to(policy.device)


class Training:
    """A policy on its way: optimiser, anchor, mean and the number of steps done."""

    def __init__(
        self,
        policy: TrainedPolicy,
        step: Step,
        *,
        steps: int,
        learning_rate: float,
        warmup_steps: int,
        max_grad_norm: float,
        seed: int,
        accumulation: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.policy = policy
        self.ranks = ranks
        self.done = 0
        self.tokens = 0
        """Of prompts and completions that went forward and backward here, an earlier attempt's not counted."""
        self.step = step
        self._steps, self._seed, self._accumulation = steps, seed, accumulation
        self._parameters = policy.trained
        descent = partial(Descent, ranks=ranks, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm)
        first, by_muon = (step.critic_steps, policy.matrices) if isinstance(step, TokenBondStep) else (0, [])
        self._descent = descent(self._parameters, first=first, last=steps, learning_rate=learning_rate, by_muon=by_muon)
        self._critic: Critic | None = None
        if isinstance(step, TokenBondStep):
            values = opened_critic(policy, seed)
            probe = dict(values.probe.named_parameters(prefix="probe"))
            others = {name: parameter for name, parameter in values.named_parameters() if name not in probe}
            descent = partial(descent, learning_rate=step.critic_learning_rate)
            self._critic = Critic(values, descent(others, last=first), descent(probe, first=first, last=steps))
        self.anchor = EmaAnchor(self._parameters) if isinstance(step, OnPolicyStep) else None
        self._mean: dict[str, Tensor] = {}

    @property
    def logged_step(self) -> LoggedStep | OfflineBondStep | TokenBondStep | None:
        """The next step, where it learns from logged candidates alone."""
        match self.step:
            case LoggedStep() | OfflineBondStep() | TokenBondStep():
                return self.step
            case BondStep():
                return self.step.imitation if self.done < self.step.imitation_steps else None
            case OnPolicyStep() | SampledStep():
                return None

    @together
    def learn_logged(self, groups: Sequence[LoggedGroup], rows_tokens: int = TRAINING_ROWS_TOKENS) -> dict[str, float]:
        """One step on logged groups, in parts of at most `rows_tokens` padded tokens; its metrics."""
        uniform = self._uniform()
        match self.logged_step:
            case LoggedStep(choose, loss):
                chosen = [choose(group, uniform()) for group in groups]
                return self._learn_in_parts(chosen, lambda part: loss(part, self._logprobs), rows_tokens)
            case OfflineBondStep(weigh, loss_of_terms):
                weighed = [weigh(group, uniform()) for group in groups]
                return self._learn_in_parts(weighed, lambda part: loss_of_terms(part, self._token_terms), rows_tokens)
            case TokenBondStep() as step:
                return self._learn_token_by_token(step, groups, uniform, rows_tokens)
            case None:
                raise AssertionError("this step learns from fresh samples")

    def _learn_token_by_token(
        self, step: TokenBondStep, groups: Sequence[LoggedGroup], uniform: Callable[[], float], rows_tokens: int
    ) -> dict[str, float]:
        critic = self._critic
        assert critic is not None
        if self.done < step.critic_steps:
            judged = [step.judge(group, uniform()) for group in groups]
            laws = partial(self.policy.said_laws, critic.values)
            return self._learn_in_parts(
                judged, lambda part: step.critic_loss(part, laws), rows_tokens, [critic.descent]
            )
        guided = [step.choose(group, uniform()) for group in groups]
        terms = partial(self._guided_terms, critic.values, step.n)
        moving = [self._descent, critic.probe_descent]
        return self._learn_in_parts(guided, lambda part: step.loss(part, terms), rows_tokens, moving)

    def _learn_in_parts(
        self,
        groups: Sequence[Chosen],
        loss: Callable[[Sequence[Chosen]], StepLoss],
        rows_tokens: int,
        descents: Sequence[Descent] = (),
    ) -> dict[str, float]:
        """descents: of what learns; the policy alone, unless told."""
        self.tokens += sum(num_tokens(group.tokens.prompt_ids, group.tokens.completion_ids) for group in groups)
        totals: dict[str, float] = {}
        plan = Plan(self.ranks, self._accumulation, rows_tokens)
        for part, share in plan.passes([group.tokens for group in groups]):
            outcome = loss(groups[part])
            torch.autograd.backward(outcome.loss * share)
            for name, value in _numbers(outcome).items():
                totals[name] = totals.get(name, 0.0) + share * value
        sums = torch.tensor(list(totals.values()), dtype=torch.float64)
        self.ranks.add_up([sums])
        return self._apply(dict(zip(totals, sums.tolist(), strict=True)), *(descents or [self._descent]))

    def _learn_at_once(
        self, loss: Callable[[SequenceLogprobs, SequenceLogprobs], StepLoss], other: SequenceLogprobs
    ) -> dict[str, float]:
        """A step whose prompts share a baseline. `other` are the log-probs, without gradient, that it asks for besides
        the policy's."""
        if self.ranks.size == self._accumulation == 1:
            outcome = loss(self._logprobs, other)
            torch.autograd.backward(outcome.loss)
        else:
            plan = Plan(self.ranks, self._accumulation)
            rehearsal = Rehearsal(plan, self._logprobs)
            outcome = loss(rehearsal, partial(plan.logprobs, other))
            torch.autograd.backward(outcome.loss)
            rehearsal.backward()
        return self._apply(_numbers(outcome), self._descent)

    @together
    def learn_fresh(self, groups: Sequence[FreshGroup]) -> dict[str, float]:
        """One step on fresh groups; the anchor follows. Its metrics."""
        assert isinstance(self.step, OnPolicyStep)
        anchor = self.anchor
        assert anchor is not None
        self.tokens += sum(num_tokens(group.prompt_ids, [group.completion_ids]) for group in groups)
        metrics = self._learn_at_once(partial(self.step.loss, groups), self._anchor_logprobs)
        if self.done % self.step.anchor_steps == 0:
            anchor.update(self._parameters, self.step.anchor_rate)
        return metrics

    @together
    def learn_ranked(self, groups: Sequence[RankedGroup]) -> dict[str, float]:
        """One step on fresh samples among logged candidates; its metrics."""
        reference_logprobs = self.policy.reference_logprobs
        self.tokens += sum(num_tokens(group.logged.tokens.prompt_ids, group.completion_ids) for group in groups)
        match self.step:
            case BondStep(choose=choose, loss=loss):
                uniform = self._uniform()
                chosen = [choose(group.logged, uniform()) for group in groups]
                self.tokens += sum(num_tokens((), one.tokens.completion_ids) for one in chosen)
                return self._learn_at_once(partial(loss, groups, chosen), reference_logprobs)
            case SampledStep(loss=loss_of_samples):
                return self._learn_at_once(partial(loss_of_samples, groups), reference_logprobs)
            case _:
                raise AssertionError("this step is not fed with samples among logged candidates")

    def _logprobs(self, groups: Sequence[TokenGroup]) -> list[Tensor]:
        logprobs = self.policy.logprobs(groups)
        self._require_numbers(logprobs)
        return logprobs

    def _token_terms(self, groups: Sequence[TokenGroup]) -> list[TokenTerms]:
        terms = self.policy.token_terms(groups)
        self._require_numbers([one.logprob_NL for one in terms])
        return terms

    def _guided_terms(self, critic: PrefixCritic, n: int, groups: Sequence[TokenGroup]) -> list[GuidedTerms]:
        terms = self.policy.guided_terms(critic, n, groups)
        self._require_numbers([one.forward_kl_NL for one in terms])
        return terms

    def _anchor_logprobs(self, groups: Sequence[TokenGroup]) -> list[Tensor]:
        assert self.anchor is not None
        logprobs = self.policy.logprobs_wearing(self.anchor.tensors, groups)
        self._require_numbers(logprobs)
        return logprobs

    def _require_numbers(self, logprobs: Sequence[Tensor]) -> None:
        """Raises JobFailed where training has left a policy whose log-probs are none, on every rank at once: all make
        equally many passes. Some losses would refuse them as data, and some make a number of what is infinite."""
        lost = torch.stack([logprob.isfinite().logical_not().sum() for logprob in logprobs]).sum()
        self.ranks.add_up([lost])
        if lost:
            raise JobFailed("loss_not_finite", f"step {self.done + 1}: {int(lost)} log-probs are no numbers")

    def _uniform(self) -> Callable[[], float]:
        """Numbers from [0, 1) that are this step's alone."""
        return random.Random(f"{self._seed}/{self.done}/candidates").random

    def _apply(self, metrics: dict[str, float], *descents: Descent) -> dict[str, float]:
        """The norm that is told is of the first one's gradient."""
        norm, *others = [descent.clipped_norm() for descent in descents]
        if not torch.isfinite(torch.tensor([norm, *others, metrics["loss"]])).all():
            numbers = f"loss {metrics['loss']}, gradient norm {norm}"
            raise JobFailed("loss_not_finite", f"step {self.done + 1}: {numbers}")
        for descent in descents:
            descent.step(self.done)
        self.done += 1
        self._average()
        return {**metrics, "grad_norm": norm}

    def _average(self) -> None:
        """Let the mean over the last steps follow, where the method wants one."""
        match self.step:
            case BondStep(averaged_steps=averaged, imitation_steps=imitation):
                count = self.done - max(self._steps - averaged, imitation)
            case OfflineBondStep(averaged_steps=averaged):
                count = self.done - max(self._steps - averaged, 0)
            case TokenBondStep(averaged_steps=averaged, critic_steps=first):
                count = self.done - max(self._steps - averaged, first)
            case _:
                return
        if count == 1:
            self._mean = {name: local(parameter.detach()).clone() for name, parameter in self._parameters.items()}
        elif count > 1:
            for name, parameter in self._parameters.items():
                self._mean[name] += (local(parameter.detach()) - self._mean[name]) / count

    @together
    def finish(self) -> None:
        """After the last step: the policy becomes the mean of its last steps, and goes back some of the way to the
        reference, where the method wants that."""
        with torch.no_grad():
            for name, mean in self._mean.items():
                local(self._parameters[name]).copy_(mean)
        if isinstance(self.step, OfflineBondStep | TokenBondStep):
            self.policy.interpolate(self.step.interpolation)

    # --- being taken up again ------------------------------------------------------------------------

    def state(self, numbers: Mapping[str, object]) -> TrainingState:
        """All that the next step depends on: how many threads share its sums, too. `numbers` are the caller's."""
        with self.policy.ranks.tells("state"):
            tensors = {f"policy/{name}": tensor for name, tensor in self.policy.factors.items()}
            tensors |= {f"optimiser/{place}": tensor for place, tensor in self._descent.state().items()}
            tensors |= {f"mean/{name}": whole(part_like(self._parameters[name], t)) for name, t in self._mean.items()}
        if self._critic is not None:
            tensors |= {f"critic/{name}": tensor.clone() for name, tensor in self._critic.values.state_dict().items()}
            state = self._critic.descent.state()
            tensors |= {f"critic_optimiser/{place}": tensor for place, tensor in state.items()}
            state = self._critic.probe_descent.state()
            tensors |= {f"probe_optimiser/{place}": tensor for place, tensor in state.items()}
        if self.anchor is not None:
            tensors.update({f"anchor/{name}": tensor for name, tensor in self.anchor.tensors.items()})
        tensors["random/cpu"] = torch.get_rng_state()
        return TrainingState(self.done, tensors, {**numbers, "threads": torch.get_num_threads()})

    def resume(self, state: TrainingState) -> None:
        """Go on from a state; every rank does. KeyError or ValueError when it is another job's."""
        tensors = state.tensors
        self.policy.load_factors(_under("policy/", tensors))
        self._descent.resume(_under("optimiser/", tensors))
        if self._critic is not None:
            self._critic.values.load_state_dict(_under("critic/", tensors))
            self._critic.descent.resume(_under("critic_optimiser/", tensors))
            self._critic.probe_descent.resume(_under("probe_optimiser/", tensors))
        means = _under("mean/", tensors).items()
        self._mean = {name: local(like(self._parameters[name], tensor)).clone() for name, tensor in means}
        if self.anchor is not None:
            device = next(iter(self._parameters.values())).device
            self.anchor = EmaAnchor({name: t.to(device) for name, t in _under("anchor/", tensors).items()})
        torch.set_rng_state(tensors["random/cpu"])
        self.done = state.step


def num_tokens(prompt_ids: Sequence[int], completion_ids: Sequence[Sequence[int]]) -> int:
    """Of a prompt, once, and its completions."""
    return len(prompt_ids) + sum(map(len, completion_ids))


def _numbers(outcome: StepLoss) -> dict[str, float]:
    return {"loss": float(outcome.loss.detach())} | {name: float(value) for name, value in outcome.metrics.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
