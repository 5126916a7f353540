"""The picture is drawn, and says in its table what was measured."""

import numpy as np
import pytest
from matplotlib.image import imread

from bon_algos.contracts import Interval
from bonsai.demo import charts, measure


@pytest.fixture(scope="module")
def measured() -> measure.Measured:
    """A reference whose gold reward peaks, and a policy two points better: ten prompts, 64 draws."""
    rng = np.random.default_rng(0)
    reward_BM = rng.normal(size=(10, 64))
    gold_BM = np.where(reward_BM < 1, reward_BM, 2 - reward_BM)
    prompts = tuple(f"prompt {row}" for row in range(10))
    is_complete_BM = np.ones(reward_BM.shape, dtype=bool)
    reference = measure.Pool(prompts, reward_BM, gold_BM, is_complete_BM, np.full(reward_BM.shape, 20.0))
    policy = measure.Pool(prompts, reward_BM + 2, gold_BM + 2, is_complete_BM, reference.tokens)
    speed = measure.Speed(tokens_per_answer=20, p50_ms=181.4, p95_ms=230, answers=24, answers_per_second=61.26)
    kl = Interval(mean=2.1, low=2.0, high=2.2)
    return measure.Measured(
        policy="pol-0123456789abcdef",
        n=16,
        prompts=10,
        one=measure.Row(arm="one", quality=measure.quality_of_one(reference, None, None), speed=speed),
        best=measure.Row(arm="best of 16", quality=measure.quality_of_best(reference, 16), speed=speed),
        distilled=measure.Row(arm="distilled", quality=measure.quality_of_one(policy, reference, kl), speed=speed),
        comparison=measure.compare(policy, reference, 16),
        curve=measure.curve_of(reference, reference),
        method="jbond",
        training_seconds=100,
        machine={"processor": "a processor", "cores": "2", "memory": "8 GiB", "python": "3.11"},
    )


def test_plus_minus_is_the_mean_and_half_of_the_interval():
    assert charts.plus_minus(Interval(mean=1.5, low=1.25, high=1.75)) == "1.50±0.25"
    assert charts.plus_minus(Interval(mean=0.5, low=0.4, high=0.6), scale=100, digits=1) == "50.0±10.0"
    assert charts.plus_minus(None) == "–"


def test_a_line_of_the_table_has_a_cell_for_each_column(measured):
    cells = charts.cells_of(measured.distilled)
    assert len(cells) == len(charts.COLUMNS)
    assert cells[4:] == ("2.10±0.10", "20", "181", "230", "61.3")


def test_the_reference_has_neither_win_rate_nor_kl_against_itself(measured):
    assert charts.cells_of(measured.one)[3:5] == ("–", "–")


@pytest.mark.slow
def test_the_picture_is_a_png_with_something_on_it(measured, tmp_path):
    charts.save(measured, tmp_path / "circle.png")
    pixels = imread(tmp_path / "circle.png")
    assert pixels.shape[1] > 1200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_a_curve_without_a_peak_is_drawn_too(measured, tmp_path):
    rising = measured.curve.model_copy(update={"peak": measured.curve.k[-1], "fall": None})
    charts.save(measured.model_copy(update={"curve": rising}), tmp_path / "rising.png")
    assert (tmp_path / "rising.png").stat().st_size > 10_000
