"""Every method taken some steps on a table: rewards are seen only by their order, and seeds agree."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bon_algos.algorithms import make_step
from bon_algos.anchor import EmaAnchor
from bon_algos.contracts import (
    BonbonConsistentSpec,
    BonbonSpec,
    BondSpec,
    BonForwardKlSpec,
    BonRegressionSpec,
    BonSftSpec,
    DpoSpec,
    IpoSpec,
    IterativeBondSpec,
    JBondSpec,
    OfflineBondSpec,
    RlooSpec,
    VbonSpec,
)
from bon_algos.steps import (
    BondStep,
    FreshGroup,
    LoggedStep,
    OfflineBondStep,
    OnPolicyStep,
    RankedGroup,
    SampledStep,
)
from tests.bon_algos.tables import logged, table, table_terms

SPECS = [
    BonForwardKlSpec(n=4),
    BonRegressionSpec(n=4),
    OfflineBondSpec(n=4),
    BondSpec(n=4),
    JBondSpec(anchor_rate=0.1),
    IterativeBondSpec(n=3, anchor_samples=5, anchor_steps=4),
    VbonSpec(n=4),
    VbonSpec(n=4, likelihood="exact", gradient="reinforce"),
    BonSftSpec(n=4),
    BonbonSpec(n=4),
    BonbonConsistentSpec(n=4),
    DpoSpec(n=4),
    IpoSpec(n=4),
]
"""All methods but the one that takes rewards on their own scale."""
BASE_REWARD_K = torch.tensor([0.3, 1.0, -0.5, 1.0, 2.0, 0.1], dtype=torch.float64)


REFERENCE_PK = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


def train_on_a_table(spec, reward_K: Tensor, *, seed: int = 0, seed_from_half: int | None = None) -> Tensor:
    """20 steps of 8 prompts over six outcomes, sampled with one seed, or with another from the tenth step. (8, 6)
    logits."""
    generator = torch.Generator().manual_seed(seed)
    step, rewards = make_step(spec), reward_K.tolist()
    reference_PK = REFERENCE_PK
    logit_PK = reference_PK.clone().requires_grad_()
    anchor = EmaAnchor({"logits": logit_PK})
    for number in range(20):
        if number == 10 and seed_from_half is not None:
            generator.manual_seed(seed_from_half)
        anchor_PK = anchor.tensors["logits"].double().log_softmax(-1)
        policy = table(logit_PK.log_softmax(-1))
        match step:
            case LoggedStep():
                drawn = torch.multinomial(reference_PK.exp(), 8, replacement=True, generator=generator).tolist()
                groups = [logged(p, drawn[p], [rewards[k] for k in drawn[p]], reference_PK[p]) for p in range(8)]
                loss = step.loss([step.choose(group, 0.5) for group in groups], policy).loss
            case OfflineBondStep():
                drawn = torch.multinomial(reference_PK.exp(), 8, replacement=True, generator=generator).tolist()
                groups = [logged(p, drawn[p], [rewards[k] for k in drawn[p]], reference_PK[p]) for p in range(8)]
                terms = table_terms(logit_PK.log_softmax(-1), reference_PK)
                loss = step.loss([step.choose(group, 0.5) for group in groups], terms).loss
            case BondStep() | SampledStep():
                drawn = torch.multinomial(reference_PK.exp(), 8, replacement=True, generator=generator).tolist()
                own = torch.multinomial(
                    logit_PK.detach().softmax(-1), 2, replacement=True, generator=generator
                ).tolist()
                logs = [logged(p, drawn[p], [rewards[k] for k in drawn[p]], reference_PK[p]) for p in range(8)]
                sampled_B2 = logit_PK.detach().log_softmax(-1).gather(1, torch.tensor(own))
                ranked = [
                    RankedGroup(log, [[k] for k in fresh], earned, sampled.tolist(), earned)
                    for log, fresh, sampled in zip(logs, own, sampled_B2, strict=True)
                    for earned in [[rewards[k] for k in fresh]]
                ]
                asked = (policy, table(reference_PK))
                if isinstance(step, SampledStep):
                    loss = step.loss(ranked, *asked).loss
                else:
                    loss = step.loss(ranked, [step.choose(log, 0.5) for log in logs], *asked).loss
            case OnPolicyStep():
                own = torch.multinomial(logit_PK.detach().softmax(-1), 1, generator=generator).tolist()
                count = step.anchor_samples
                of_anchor = torch.multinomial(anchor_PK.exp(), count, replacement=True, generator=generator).tolist()
                fresh = [
                    FreshGroup([p], own[p], rewards[own[p][0]], [[k] for k in some], [rewards[k] for k in some])
                    for p, some in enumerate(of_anchor)
                ]
                loss = step.loss(fresh, policy, table(anchor_PK)).loss
                if (number + 1) % step.anchor_steps == 0:
                    anchor.update({"logits": logit_PK}, step.anchor_rate)
        with torch.no_grad():
            logit_PK -= 0.5 * torch.autograd.grad(loss, logit_PK)[0]
    return logit_PK.detach()


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_training_sees_rewards_only_by_their_order(spec):
    """The same seed on r, e^r and r³: the same policy, bit for bit."""
    trained_PK = train_on_a_table(spec, BASE_REWARD_K)
    assert torch.equal(train_on_a_table(spec, BASE_REWARD_K.exp()), trained_PK)
    assert torch.equal(train_on_a_table(spec, BASE_REWARD_K**3), trained_PK)
    assert not torch.equal(train_on_a_table(spec, -BASE_REWARD_K), trained_PK)


def test_rloo_alone_takes_rewards_on_their_own_scale():
    trained_PK = train_on_a_table(RlooSpec(), BASE_REWARD_K)
    assert not torch.equal(train_on_a_table(RlooSpec(), BASE_REWARD_K.exp()), trained_PK)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [BondSpec(n=4), JBondSpec(anchor_rate=0.1)], ids=lambda spec: type(spec).__name__)
def test_a_job_that_draws_for_itself_agrees_with_other_seeds_interrupted_or_not(spec):
    """What an engine draws is never the same again. A job whose second half draws anew, as that of a killed one does,
    earns what its like do: within the 99 % t interval for one more of ten seeds. That interval does not hold what it
    began with."""

    def earned(seed: int, **more: int) -> float:
        law_PK = train_on_a_table(spec, BASE_REWARD_K, seed=seed, **more).softmax(-1)
        return float((law_PK @ BASE_REWARD_K).mean())

    seeds = np.array([earned(seed) for seed in range(1, 11)])
    half_width = scipy.stats.t.ppf(0.995, len(seeds) - 1) * seeds.std(ddof=1) * np.sqrt(1 + 1 / len(seeds))
    low, high = seeds.mean() - half_width, seeds.mean() + half_width
    for seed in (11, 12):
        assert low < earned(seed, seed_from_half=100 + seed) < high
    assert float((REFERENCE_PK.exp() @ BASE_REWARD_K).mean()) < low
