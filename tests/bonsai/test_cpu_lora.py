"""Adapters on CPUs: each row has its own adapter or none, whatever stands in the other slots."""

import pytest
import torch

from bonsai.cpu_lora import NO_ADAPTER, bgmv_expand, bgmv_expand_slice, bgmv_shrink

SLOTS, RANK, WIDE, NARROW = 3, 2, 6, 4


def rows_of(slots):
    return torch.tensor(slots, dtype=torch.long)


def row_by_row(inputs, weights, slots):
    """What the operations owe each row, one at a time."""
    return torch.stack(
        [
            torch.zeros(weights.shape[-2])
            if slot == NO_ADAPTER
            else weights.reshape(SLOTS, *weights.shape[-2:])[slot] @ x
            for x, slot in zip(inputs, slots, strict=True)
        ]
    )


@pytest.fixture(params=["stacked", "stacked with a dimension of one"])
def shape(request):
    return (SLOTS, 1) if request.param.endswith("one") else (SLOTS,)


mixes = pytest.mark.parametrize(
    "slots", [[2, 2, 2], [0, NO_ADAPTER, 2, 0, 1], [NO_ADAPTER, NO_ADAPTER], [NO_ADAPTER, 2]]
)


@mixes
def test_shrinking_takes_each_row_through_its_own_adapter(slots, shape):
    torch.manual_seed(0)
    inputs, weights = torch.randn(len(slots), WIDE), torch.randn(*shape, RANK, WIDE)
    output = torch.full((len(slots), RANK), 7.0)
    bgmv_shrink(inputs, weights, output, rows_of(slots), 0.5)
    torch.testing.assert_close(output, 0.5 * row_by_row(inputs, weights, slots))


@mixes
@pytest.mark.parametrize("add", [True, False])
def test_expanding_adds_each_rows_own_adapter_or_nothing(slots, shape, add):
    torch.manual_seed(0)
    inputs, weights = torch.randn(len(slots), RANK), torch.randn(*shape, NARROW, RANK)
    before = torch.randn(len(slots), WIDE)
    part, whole = before.clone(), before.clone()
    bgmv_expand_slice(inputs, weights, part, rows_of(slots), 1, NARROW, add)
    bgmv_expand(inputs, weights, whole, rows_of(slots), add)
    own = row_by_row(inputs, weights, slots)
    for output, first in ((part, 1), (whole, 0)):
        expected = before.clone()
        expected[:, first : first + NARROW] = own + (before[:, first : first + NARROW] if add else 0)
        torch.testing.assert_close(output, expected)


def test_weights_padded_beyond_the_output_lose_their_padding():
    weights, output = torch.ones(SLOTS, NARROW, RANK), torch.zeros(1, NARROW - 1)
    bgmv_expand(torch.ones(1, RANK), weights, output, rows_of([0]))
    assert output.tolist() == [[RANK] * (NARROW - 1)]


def test_one_slot_stands_for_all_rows_and_two_for_three_are_refused():
    weights, output = torch.ones(SLOTS, RANK, WIDE), torch.zeros(3, RANK)
    bgmv_shrink(torch.ones(3, WIDE), weights, output, rows_of([1]))
    assert output.tolist() == [[WIDE] * RANK] * 3
    with pytest.raises(ValueError, match="3 rows, but 2 adapter slots"):
        bgmv_shrink(torch.ones(3, WIDE), weights, output, rows_of([0, 1]))
