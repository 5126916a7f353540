"""What the demo shows while it waits."""

import io

from rich.console import Console

from bonsai.demo import progress
from bonsai.job_replies import Job, JobDetails


def job(step: int, reward: float | None, kl: float | None = None) -> Job:
    metrics = {"reward": reward, "kl_policy_reference": kl}
    details = JobDetails(phase="training", step=step, steps=10, metrics=metrics, seconds_left=65)
    return Job(id="job_1", status="running", details=details)


def test_a_sparkline_rises_with_its_values():
    assert progress.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"


def test_a_long_series_is_averaged_into_the_width():
    # 0 0 | 4 4 | 8 8: three stretches, lowest, middle, highest
    assert progress.sparkline([0, 0, 4, 4, 8, 8], 3) == "▁▅█"


def test_nothing_and_no_change_are_lines_too():
    assert progress.sparkline([], 5) == ""
    assert progress.sparkline([2.0, 2.0], 5) == "▁▁"


def test_a_job_leaves_its_curve_and_its_last_numbers():
    page = io.StringIO()
    console = progress.fit(Console(file=page))
    with progress.JobDisplay(console, job(0, None)) as display:
        for step in range(1, 9):
            display.update(job(step, 0.25 * step, 0.1 * step))
    assert "▁▂▃▄▅▆▇█" in page.getvalue()
    assert "+2.00" in page.getvalue()
    assert "0.80 nats" in page.getvalue()


def test_what_was_not_measured_again_is_drawn_once():
    page = io.StringIO()
    with progress.JobDisplay(progress.fit(Console(file=page)), job(0, None)) as display:
        for step, reward in ((1, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (3, 2.0)):
            display.update(job(step, reward))
    assert "▁█ " in page.getvalue()


def test_parts_are_numbered_and_timed():
    page = io.StringIO()
    told = progress.Parts(progress.fit(Console(file=page)))
    with told.part("First", budget=5):
        pass
    with told.part("Second", budget=7):
        pass
    told.show()
    assert "1 · First" in page.getvalue()
    assert "2 · Second" in page.getvalue()
    assert "12" in page.getvalue()  # 5 + 7 seconds planned together
