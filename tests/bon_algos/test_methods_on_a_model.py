"""Every method taken to where it ends, on a language model that can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bon_algos import order
from bon_algos.algorithms import make_step
from bon_algos.contracts import (
    BonbonConsistentSpec,
    BondSpec,
    BonForwardKlSpec,
    BonRegressionSpec,
    IterativeBondSpec,
    OfflineBondSpec,
    RlooSpec,
    VbonSpec,
)
from bon_algos.logprobs import TokenGroup, sequence_logprobs
from bon_algos.steps import (
    BondStep,
    FreshGroup,
    LoggedGroup,
    LoggedStep,
    OfflineBondStep,
    OnPolicyStep,
    RankedGroup,
    SampledStep,
)
from bon_algos.token_kl import token_terms

COMPLETIONS = [list(pair) for pair in product(range(5), repeat=2)]
"""All completions of two tokens out of five: a language model that can be enumerated."""
REWARD_25 = np.array([10.0 * a - abs(a - b) for a, b in COMPLETIONS]) % 7
PROMPTS = [[0, 1], [0, 2, 3]]


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    build: Any = LlamaForCausalLM
    return build(LlamaConfig(vocab_size=5, num_attention_heads=2, pad_token_id=None, eos_token_id=None, **sizes))


def law_of(model) -> Tensor:
    """The model's law over the 25 completions, for each prompt. (2, 25), float64."""
    logprobs = sequence_logprobs(model, [TokenGroup(prompt, COMPLETIONS) for prompt in PROMPTS])
    return torch.stack(list(logprobs)).double().exp()


def logged_pair(prompt: int, outcomes: list[int], reference_P25: Tensor) -> LoggedGroup:
    return LoggedGroup(
        TokenGroup(PROMPTS[prompt], [COMPLETIONS[k] for k in outcomes]),
        REWARD_25[outcomes].tolist(),
        reference_P25[prompt, outcomes].log().tolist(),
    )


def minimise(parameters: Iterable[nn.Parameter], steps: int, loss: Callable[[], Tensor]) -> None:
    """Adam at a rate that falls to a twentieth; `loss` draws what it needs anew at every step."""
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    cooling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(loss())
        optimiser.step()
        cooling.step()


def draws_of(law_P25: Tensor, count: int, generator: torch.Generator) -> list[list[int]]:
    """Outcomes of 16 prompts, the two in turn. (16, count)."""
    return torch.multinomial(law_P25.repeat(8, 1), count, replacement=True, generator=generator).tolist()


def logged_groups(reference_P25: Tensor, count: int, generator: torch.Generator) -> list[LoggedGroup]:
    drawn = draws_of(reference_P25, count, generator)
    return [logged_pair(row % 2, outcomes, reference_P25) for row, outcomes in enumerate(drawn)]


def ranked_groups(model, reference_P25: Tensor, count: int, generator: torch.Generator) -> list[RankedGroup]:
    """Fresh samples of the model, among 64 of the reference."""
    law_P25, logged = law_of(model).detach(), logged_groups(reference_P25, 64, generator)
    return [
        RankedGroup(
            group,
            [COMPLETIONS[k] for k in own],
            REWARD_25[own].tolist(),
            law_P25[row % 2, own].log().tolist(),
            REWARD_25[own].tolist(),
        )
        for row, (group, own) in enumerate(zip(logged, draws_of(law_P25, count, generator), strict=True))
    ]


def win_and_kl(law_25: np.ndarray, reference_25: np.ndarray) -> tuple[float, float]:
    beats = (REWARD_25[:, None] > REWARD_25) + (REWARD_25[:, None] == REWARD_25) / 2
    return float(law_25 @ beats @ reference_25), float((law_25 * np.log(law_25 / reference_25)).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        BonForwardKlSpec(n=4, candidates_per_prompt=8),
        BonRegressionSpec(n=4, candidates_per_prompt=16),
        BonbonConsistentSpec(n=4, candidates_per_prompt=16),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_a_language_model_becomes_its_own_best_of_four(spec):
    """Logged groups of 16 only: the model's win rate and KL end where best-of-4's are, prompt by prompt."""
    model, step = tiny_model(), make_step(spec)
    assert isinstance(step, LoggedStep)
    reference_P25 = law_of(model).detach()
    generator = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        groups = logged_groups(reference_P25, 16, generator)
        chosen = [step.choose(group, torch.rand((), generator=generator).item()) for group in groups]
        return step.loss(chosen, lambda asked: sequence_logprobs(model, asked)).loss

    minimise(model.parameters(), 120, loss)
    require_best_of_four(model, reference_P25)


def require_best_of_four(model, reference_P25: Tensor) -> None:
    require_law(model, reference_P25, lambda reference_25: order.best_of_n_law(reference_25, REWARD_25, 4))


def require_law(model, reference_P25: Tensor, expected_law) -> None:
    for law_25, reference_25 in zip(law_of(model).detach().numpy(), reference_P25.numpy(), strict=True):
        win, kl = win_and_kl(law_25, reference_25)
        expected_win, expected_kl = win_and_kl(expected_law(reference_25), reference_25)
        assert win == pytest.approx(expected_win, abs=0.03)
        assert kl == pytest.approx(expected_kl, abs=0.12)


@pytest.mark.slow
def test_offline_bond_takes_a_language_model_to_its_best_of_four():
    """Logged groups of 16 only, and a token-wise KL that weighs little; the head stays as it is, made large enough to
    express any law."""
    model = tiny_model()
    model.lm_head.weight.data *= 10
    spec = OfflineBondSpec(n=4, backward_n=4, token_kl_weight=0.02, candidates_per_prompt=16, max_importance=100)
    step = make_step(spec)
    assert isinstance(step, OfflineBondStep)
    reference_P25 = law_of(model).detach()
    layers = list(model.model.layers.parameters())
    of_reference = [parameter.detach().clone() for parameter in layers]

    @contextmanager
    def as_reference():
        own = [parameter.data for parameter in layers]
        try:
            for parameter, other in zip(layers, of_reference, strict=True):
                parameter.data = other
            yield
        finally:
            for parameter, other in zip(layers, own, strict=True):
                parameter.data = other

    generator = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        groups = logged_groups(reference_P25, 16, generator)
        weighed = [step.choose(group, torch.rand((), generator=generator).item()) for group in groups]
        return step.loss(weighed, lambda asked: token_terms(model, asked, as_reference)).loss

    minimise(layers, 200, loss)
    require_best_of_four(model, reference_P25)


@pytest.mark.slow
def test_bond_takes_a_language_model_to_its_best_of_four():
    """Fresh samples ranked among logged groups of 64; the same end as from logged groups alone."""
    model, step = tiny_model(), make_step(BondSpec(n=4, samples_per_prompt=4, candidates_per_prompt=8))
    assert isinstance(step, BondStep)
    reference_P25 = law_of(model).detach()
    generator = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        groups = ranked_groups(model, reference_P25, 4, generator)
        chosen = [step.choose(group.logged, torch.rand((), generator=generator).item()) for group in groups]
        asked = (partial(sequence_logprobs, model), partial(references_of, reference_P25))
        return step.loss(groups, chosen, *asked).loss

    minimise(model.parameters(), 150, loss)
    require_best_of_four(model, reference_P25)


def references_of(reference_P25: Tensor, groups: Sequence[TokenGroup]) -> list[Tensor]:
    return [reference_of(group, reference_P25) for group in groups]


def reference_of(group: TokenGroup, reference_P25: Tensor) -> Tensor:
    outcomes = [COMPLETIONS.index(list(completion)) for completion in group.completion_ids]
    return reference_P25[PROMPTS.index(list(group.prompt_ids)), outcomes].log().float()


def mid_rank_power(reference_25: np.ndarray, n: int) -> np.ndarray:
    """π_ref·p_midⁿ⁻¹/Z."""
    beats = (REWARD_25[:, None] > REWARD_25) + (REWARD_25[:, None] == REWARD_25) / 2
    law_25 = reference_25 * (beats @ reference_25) ** (n - 1)
    return np.asarray(law_25 / law_25.sum())


def boltzmann(reference_25: np.ndarray, kl_strength: float) -> np.ndarray:
    """π_ref·exp(r/β)/Z."""
    law_25 = reference_25 * np.exp(REWARD_25 / kl_strength)
    return np.asarray(law_25 / law_25.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "expected_law"),
    [
        (VbonSpec(n=4, samples_per_prompt=8), lambda reference_25: mid_rank_power(reference_25, 4)),
        (RlooSpec(kl_strength=3.0, samples_per_prompt=8), lambda reference_25: boltzmann(reference_25, 3.0)),
    ],
    ids=["vbon", "rloo"],
)
def test_samples_of_the_policy_take_a_language_model_to_the_law_of_their_method(spec, expected_law):
    model, step = tiny_model(), make_step(spec)
    assert isinstance(step, SampledStep)
    reference_P25 = law_of(model).detach()
    generator = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        groups = ranked_groups(model, reference_P25, 8, generator)
        return step.loss(groups, partial(sequence_logprobs, model), partial(references_of, reference_P25)).loss

    minimise(model.parameters(), 200, loss)
    require_law(model, reference_P25, expected_law)


@pytest.mark.slow
def test_two_rounds_of_iterative_bond_are_best_of_four():
    """Best-of-2 of an anchor that becomes the policy once, half way."""
    model, step = tiny_model(), make_step(IterativeBondSpec(n=2, anchor_samples=16, anchor_steps=150))
    assert isinstance(step, OnPolicyStep)
    reference_P25 = law_of(model).detach()
    generator = torch.Generator().manual_seed(1)

    def loss(anchor_P25: Tensor) -> Tensor:
        own = draws_of(law_of(model).detach(), 1, generator)
        some = draws_of(anchor_P25, 16, generator)
        groups = [
            FreshGroup(
                PROMPTS[row % 2],
                COMPLETIONS[sample],
                REWARD_25[sample],
                [COMPLETIONS[k] for k in of_anchor],
                REWARD_25[of_anchor].tolist(),
            )
            for row, ((sample,), of_anchor) in enumerate(zip(own, some, strict=True))
        ]
        return step.loss(groups, partial(sequence_logprobs, model), partial(references_of, anchor_P25)).loss

    for _ in range(2):
        minimise(model.parameters(), step.anchor_steps, partial(loss, law_of(model).detach()))
    require_best_of_four(model, reference_P25)
