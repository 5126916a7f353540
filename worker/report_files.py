"""A report's files: the record, the model card, the figure; in a directory that their own digests name.

Owns their names and that they are whole or absent. Does not own what stands in them. Nothing else is ever written
there: the policy's own directory holds what an engine loads, and only that.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from bon_algos.contracts import PolicyReport, report_digest
from worker.durable import staged
from worker.model_card import model_card
from worker.report_figure import report_figure


def write_report(artefacts: Path, report: PolicyReport) -> dict[str, str]:
    """Below `reports/`; the sha256 of each file by its name, for the manifest."""
    contents = {
        "README.md": model_card(report).encode(),
        "report.json": report.model_dump_json(indent=1).encode() + b"\n",
        "report.png": report_figure(report),
    }
    files = {name: sha256(content).hexdigest() for name, content in contents.items()}
    home = artefacts / "reports" / report_digest(files)
    with staged(home, points=("report.written", "report.renamed")) as aside:
        for name, content in contents.items():
            (aside / name).write_bytes(content)
    return files
