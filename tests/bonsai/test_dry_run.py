"""`bonsai distill dry-run`: what the gateway tells, as a table, and the status of a job that would fail."""

from __future__ import annotations

import json

from click.testing import CliRunner
from rich.console import Console

from bon_algos.acceptance import Requirements, choose
from bon_algos.contracts import DataReport
from bon_algos.data_report import data_report
from bonsai.cli import main
from bonsai.dry_run import table
from bonsai.job_replies import DryRun
from tests.worker import world


def told(groups) -> DataReport:
    wanted = Requirements(world.BASE, world.REWARD_MODEL, world.TEMPLATE, 2)
    tokens = {group.id: 1000 for group in groups}
    choice = choose(groups, wanted, 100)
    return data_report(choice, wanted, tokens, n=2, held_out_fraction=0.3, groups_read=len(groups), is_whole=True)


def shown(report: DataReport, seconds: float | None = 90.0) -> str:
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table(DryRun(data=report, expected_seconds=seconds, expected_from_jobs=3)))
    return capture.get()


def test_the_table_says_what_is_there():
    groups = [world.group(f"g{i}", [0, i], (0.0, 1.0), prompt=f"p {i}") for i in range(8)]
    text = shown(told([*groups, world.group("old", [0, 1], store=False)]))
    for words in (
        "8 of 9 accepted", "1 not_stored", "held out", "best of 2", "+0.5 over one sample", "0.0% of pairs",
        "1.5 min, by 3 jobs like it",
    ):  # fmt: skip
        assert words in text, words
    assert "would fail" not in text


def test_the_table_says_why_a_job_would_fail():
    assert "empty_window: 0 usable groups" in shown(told([]), None)
    assert "unknown: no job of this method" in shown(told([]), None)


def test_a_spec_that_is_none_and_a_gateway_that_is_none_are_told(tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text("{}")
    bad = CliRunner().invoke(main, ["distill", "dry-run", str(spec)])
    assert bad.exit_code == 2
    assert "method" in bad.output
    spec.write_text(json.dumps({"method": {"type": "bond"}}))
    away = CliRunner().invoke(
        main, ["distill", "--url", "http://127.0.0.1:9", "dry-run", str(spec)], env={"BONSAI_API_KEY": "sk-none"}
    )
    assert away.exit_code == 2
