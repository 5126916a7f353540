"""The moving anchor: where it starts, where it goes, and that for LoRA it averages the update itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bon_algos.anchor import EmaAnchor


def tensors(*values: float) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.lora_B": torch.full((2, 3), value) for i, value in enumerate(values)}


def test_the_anchor_begins_as_what_it_is_given_and_keeps_a_copy():
    policy = tensors(1.0, 2.0)
    anchor = EmaAnchor(policy)
    policy["layer.0.lora_B"].add_(5)
    assert torch.equal(anchor.tensors["layer.0.lora_B"], torch.full((2, 3), 1.0))


def test_one_update_by_hand():
    # .75 · 1 + .25 · 5 = 2
    anchor = EmaAnchor(tensors(1.0))
    anchor.update(tensors(5.0), 0.25)
    assert torch.equal(anchor.tensors["layer.0.lora_B"], torch.full((2, 3), 2.0))


def test_rate_one_is_the_policy_and_rate_zero_stays():
    policy = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    anchor = EmaAnchor({"w": torch.zeros(50)})
    anchor.update(policy, 0.0)
    assert torch.equal(anchor.tensors["w"], torch.zeros(50))
    anchor.update(policy, 1.0)
    assert torch.equal(anchor.tensors["w"], policy["w"])


def test_small_rates_are_not_lost_on_a_bf16_policy():
    """bf16 has 8 bits: 1 + .001 rounds back to 1, but 200 updates at .001 must move the anchor."""
    anchor = EmaAnchor({"w": torch.ones(1, dtype=torch.bfloat16)})
    for _ in range(200):
        anchor.update({"w": torch.full((1,), 2.0, dtype=torch.bfloat16)}, 0.001)
    assert anchor.tensors["w"].item() == pytest.approx(2 - 0.999**200, abs=1e-5)


def test_a_checkpoint_takes_up_where_it_left_off():
    anchor = EmaAnchor(tensors(1.0))
    anchor.update(tensors(5.0), 0.3)
    resumed = EmaAnchor(anchor.tensors)
    for continued in (anchor, resumed):
        continued.update(tensors(-2.0), 0.3)
    assert torch.equal(resumed.tensors["layer.0.lora_B"], anchor.tensors["layer.0.lora_B"])


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="rate"):
        EmaAnchor(tensors(1.0)).update(tensors(1.0), rate)


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match=r"layer\.1"):
        EmaAnchor(tensors(1.0)).update(tensors(1.0, 2.0), 0.5)
    with pytest.raises(ValueError, match="shape"):
        EmaAnchor(tensors(1.0)).update({"layer.0.lora_B": torch.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="nothing"):
        EmaAnchor({})


def test_a_trained_factor_a_is_refused():
    with pytest.raises(ValueError, match="A frozen"):
        EmaAnchor({"q_proj.lora_A.default.weight": torch.ones(1)})


def test_the_anchor_of_a_lora_is_the_average_of_its_updates():
    """A real adapter, A frozen, AdamW for 20 steps: the anchor's B·A is the moving average of B·A."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    build: Any = LlamaForCausalLM
    base = build(LlamaConfig(vocab_size=31, **sizes))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    factor = dict(model.named_parameters())
    for name, parameter in factor.items():
        parameter.requires_grad_("lora_B" in name)
    trained = {name: parameter for name, parameter in factor.items() if parameter.requires_grad}
    assert len(trained) == 14

    def update_of(name: str, b: torch.Tensor) -> Any:
        return b.detach().double() @ factor[name.replace("lora_B", "lora_A")].detach().double()

    anchor, rate = EmaAnchor(trained), 0.02
    average = {name: update_of(name, b) for name, b in trained.items()}
    assert all(update.abs().max() == 0 for update in average.values())  # the reference, at step 0
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    token_BL = torch.randint(0, 31, (2, 8))
    for _ in range(20):
        optimiser.zero_grad()
        model(input_ids=token_BL, labels=token_BL).loss.backward()
        optimiser.step()
        anchor.update(trained, rate)
        average = {
            name: (1 - rate) * update + rate * update_of(name, trained[name]) for name, update in average.items()
        }
    for name, update in average.items():
        torch.testing.assert_close(update_of(name, anchor.tensors[name]), update, atol=1e-7, rtol=1e-5)
        assert update.abs().max() > 1e-3

    # Written into the model, the anchor is what the model then serves.
    policy_logits = model(input_ids=token_BL).logits
    anchor.copy_to(trained)
    assert torch.equal(next(iter(trained.values())).detach(), next(iter(anchor.tensors.values())))
    assert not torch.equal(model(input_ids=token_BL).logits, policy_logits)
