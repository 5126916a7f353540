"""The papers' experiments, reproduced small: what holds, what does not, and one picture of every method.

    python -m benchmarks.papers                # every claim at one n, three seeds; at most an hour on two cores
    python -m benchmarks.papers --quick        # one seed: minutes
    python -m benchmarks.papers --full         # every n that a paper has; take it in several runs

An experiment that has ended is kept in DIRECTORY and not run again by the same code, so that a run that was interrupted
goes on where it was; --fresh begins anew. The report is DIRECTORY/report.md with its pictures, and --publish writes it
to docs/papers, that of another effort to docs/papers/EFFORT.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.claims import Claim, arguments, finish, table
from benchmarks.papers import digests
from benchmarks.papers.exact import EXPERIMENTS as EXACT
from benchmarks.papers.findings import Effort, Experiment, Finding, as_claims, draw, section
from benchmarks.papers.model import EXPERIMENTS as ON_A_MODEL
from bonsai import machine

EXPERIMENTS = (*EXACT, *ON_A_MODEL)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "papers"


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    efforts = parser.add_mutually_exclusive_group()
    efforts.add_argument("--quick", dest="effort", action="store_const", const="quick", default="default")
    efforts.add_argument("--full", dest="effort", action="store_const", const="full")
    parser.add_argument("--directory", type=Path, help="where findings are kept (out/papers-EFFORT)")
    parser.add_argument("--only", nargs="*", metavar="KEY", choices=[one.key for one in EXPERIMENTS])
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write the report to docs/papers (--full: docs/papers/full, --quick: docs/papers/quick)",
    )
    options = parser.parse_args()
    effort: Effort = options.effort
    directory = options.directory or Path("out") / f"papers-{effort}"
    if options.fresh:
        shutil.rmtree(directory, ignore_errors=True)
    wanted = [one for one in EXPERIMENTS if not options.only or one.key in options.only]
    console = Console()
    findings = run_all(wanted, effort, directory / digests.of_experiments(), console)
    for finding in findings.values():
        console.print(table(finding.title, finding.columns, finding.rows))
    report = write_report(findings, effort, directory)
    if options.markdown:
        shutil.copyfile(report, options.markdown)
    if options.publish:
        publish(directory, DOCS if effort == "default" else DOCS / effort)
    claims = [Claim(f"{key}: {claim.name}", *claim[1:]) for key, one in findings.items() for claim in as_claims(one)]
    if not claims:  # a part of the experiments may only show numbers
        console.print("These experiments claim nothing at this effort.")
        return 0
    figures = {key: one.model_dump(mode="json", exclude={"curves"}) for key, one in findings.items()}
    return finish(claims, options.json, figures, console)


def run_all(wanted: list[Experiment], effort: Effort, kept: Path, console: Console) -> dict[str, Finding]:
    """Of each experiment what an earlier run has left in `kept`, or what this one finds and leaves there."""
    kept.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(28), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        return {
            one.key: _found(one, effort, kept / f"{one.key}.json", progress, progress.add_task(one.key))
            for one in wanted
        }


def _found(experiment: Experiment, effort: Effort, kept: Path, progress: Progress, task: TaskID) -> Finding:
    if not kept.exists():
        started_at = time.monotonic()
        finding = experiment.run(effort, lambda share: progress.update(task, completed=100 * share))
        seconds = time.monotonic() - started_at
        finding = finding.model_copy(update={"method": f"{finding.method} ({seconds:.0f} s.)"})
        aside = kept.with_suffix(".part")
        aside.write_text(finding.model_dump_json(indent=1))
        aside.rename(kept)
    progress.update(task, completed=100)
    return Finding.model_validate_json(kept.read_text())


def write_report(findings: dict[str, Finding], effort: Effort, directory: Path) -> Path:
    """The report's file, beside its pictures."""
    parts = [
        f"# The papers' experiments, reproduced small ({effort})\n",
        "Written by `python -m benchmarks.papers`; 95 % intervals. A claim below is one we stand behind; what a paper"
        " claims and does not show here is said in words.\n",
        f"{machine.one_line(machine.describe())}\n",
    ]
    for key, finding in findings.items():
        picture = f"{key}.png" if finding.curves else None
        if picture:
            draw(finding, directory / picture)
        parts.append(section(finding, picture))
    report = directory / "report.md"
    report.write_text("\n".join(parts))
    return report


def publish(directory: Path, docs: Path) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    for file in [directory / "report.md", *directory.glob("*.png")]:
        shutil.copyfile(file, docs / file.name)


if __name__ == "__main__":
    sys.exit(main())
