"""What an engine must answer to prove that it serves a policy: numbers by hand."""

from __future__ import annotations

import pytest

from service.fingerprint import compare_fingerprint
from tests.service.published import COMPLETIONS, base_logprob, fingerprint


def answers(distance: float) -> list[list[float]]:
    return [[base_logprob(token) - distance for token in row] for row in COMPLETIONS]


@pytest.mark.parametrize(
    ("trained", "served", "passes"),
    [
        (0.5, 0.5, True),
        (0.5, 0.5 + 0.9e-3, True),
        (0.5, 0.5 + 1.1e-3, False),  # More than 1e-3 from the trainer.
        (0.5, 0.0, False),  # The base under the policy's name: 0.5 nats away.
        (0.004, 0.004 + 0.3e-3, True),  # A tenth of 0.004 is 4e-4.
        (0.004, 0.004 + 0.5e-3, False),
        (0.0005, 0.0, False),  # Within 1e-3 of the trainer, and yet it is the base.
        (0.0, 0.0, True),
    ],
)
def test_the_engine_must_be_close_to_the_trainer_and_far_closer_than_the_base(
    trained: float, served: float, passes: bool
):
    result = compare_fingerprint(fingerprint(trained), answers(served), 1e-3)
    assert result.passed == passes
    assert result.tokens == 320
    assert result.mean_abs_difference == pytest.approx(abs(trained - served))
    assert result.mean_abs_base_distance == pytest.approx(trained)


def test_too_few_tokens_prove_nothing():
    short = fingerprint().model_copy(
        update={
            field: getattr(fingerprint(), field)[:7]
            for field in ("prompt_token_ids", "completion_token_ids", "policy_logprobs", "base_logprobs")
        }
    )
    result = compare_fingerprint(short, answers(0.5)[:7], 1e-3)  # 7 · 32 = 224 < 256.
    assert (result.passed, result.tokens) == (False, 224)


def test_an_answer_that_is_not_a_number_does_not_pass():
    broken = answers(0.5)
    broken[0][0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        compare_fingerprint(fingerprint(), broken, 1e-3)


def test_every_token_must_be_answered_for():
    with pytest.raises(ValueError, match="every token"):
        compare_fingerprint(fingerprint(), [row[:-1] for row in answers(0.5)], 1e-3)
