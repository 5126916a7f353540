"""A report's files: named by their digests, whole; a card that Hugging Face reads, a picture that is one."""

import hashlib
import struct

import numpy as np
import pytest
from huggingface_hub import ModelCard

from bon_algos.contracts import REPORT_FILES, PolicyReport, report_digest
from tests.worker import drawn
from tests.worker.test_report import opinion_of, report_of, sampled
from worker.model_card import model_card
from worker.report_files import write_report


@pytest.fixture(scope="module")
def report():
    judged = sampled(0, prompts=12)
    return report_of(judged, opinion=opinion_of(judged))


def test_the_files_stand_in_a_directory_that_their_digests_name(report, tmp_path):
    files = write_report(tmp_path, report)
    (home,) = (tmp_path / "reports").iterdir()
    assert home.name == report_digest(files)
    assert sorted(path.name for path in home.iterdir()) == sorted(files) == sorted(REPORT_FILES)
    assert files == {name: hashlib.sha256((home / name).read_bytes()).hexdigest() for name in files}
    assert PolicyReport.model_validate_json((home / "report.json").read_text()) == report
    assert write_report(tmp_path, report) == files  # a second attempt with the same numbers finds its own


def test_the_picture_is_a_png_of_a_readable_size(report, tmp_path):
    write_report(tmp_path, report)
    (home,) = (tmp_path / "reports").iterdir()
    content = (home / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1920, 765)
    assert len(content) < 500_000


def test_the_card_is_one_that_hugging_face_reads(report):
    front_matter = ModelCard(model_card(report)).data.to_dict()
    assert (front_matter["base_model"], front_matter["library_name"]) == (report.base_policy_id, "peft")
    assert report.method in front_matter["tags"]
    [model] = front_matter["model-index"]
    assert model["name"] == report.policy_id
    told = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert told["win_rate"] == pytest.approx(report.win_rate_reference.mean, abs=1e-6)
    assert told["second_reward"] == pytest.approx(report.judge.policy.mean, abs=1e-6)


def test_the_card_says_what_there_is_and_what_there_is_not(report):
    text = model_card(report)
    assert "0 of them are among the 0 prompts of this policy's training, compared token by token." in text
    assert "A second reward model, `rm-9999999999999999`, which neither chose nor trained" in text
    alone = report_of([drawn.row(i, [9.0] * 4, [0.0, 1.0, 2.0, 3.0 + i]) for i in range(3)])
    text = model_card(alone)
    assert "No second reward model is configured" in text
    assert "No KL ratio to the frontier: The policy wins 100.0%" in text


def test_the_card_names_the_ancestors_of_whose_training_nobody_knows():
    imported = "pol-" + "7" * 16
    text = model_card(report_of(sampled(0, prompts=4), unknown=(imported,)))
    assert f"What `{imported}` learned from is not known here" in text


def test_every_degenerate_report_can_be_drawn_and_written(tmp_path):
    """All ties, two prompts, empty completions: nothing is divided by nothing on the way to the files."""
    empty = [drawn.rollout(0.0, tokens=0, text="")] * 3
    ties = [drawn.row(i, [1.0] * 3, [1.0] * 3) for i in range(2)]
    for judged in (ties, [drawn.row(i, empty, empty) for i in range(2)]):
        files = write_report(tmp_path, report_of(judged, n=2, kl=[0.0, 0.0]))
        assert set(files) == set(REPORT_FILES)
    assert np.isfinite(report_of(ties, n=2).reward.policy.mean)
