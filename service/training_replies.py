"""The form of replies about what jobs learn from: files and dry runs, as JSON Schema.

Owns: their members. Does not own: filling them (files.py, dry_run.py), the words they are written in (replies.py).
"""

from __future__ import annotations

from typing import Final

from bon_algos.contracts import DataReport, JobSpec
from service.replies import FLAG, NUMBER, TEXT, WHOLE, Named, kind, maybe, members, rows

DRY_RUN: Final = Named(
    "DryRun",
    members(
        object=kind("bonsai.dry_run"),
        spec=JobSpec,
        data=DataReport,
        expected_seconds=maybe(NUMBER),
        expected_from_jobs=WHOLE,
    ),
)
FAULT: Final = members(line=maybe(WHOLE), message=TEXT)
FILE: Final = Named(
    "File",
    members(
        id=TEXT,
        object=kind("file"),
        bytes=WHOLE,
        created_at=WHOLE,
        filename=TEXT,
        purpose=kind("fine-tune"),
        status={"enum": ["processed", "error"]},
        status_details=maybe(TEXT),
        bonsai=members(
            format={"enum": ["jsonl", "parquet"]}, rows=WHOLE, has_rewards=FLAG, faults=rows(FAULT), sha256=TEXT
        ),
    ),
)
CONTENT: Final = {"type": "string", "format": "binary"}
DELETED_FILE: Final = Named("DeletedFile", members(id=TEXT, object=kind("file"), deleted={"const": True}))
