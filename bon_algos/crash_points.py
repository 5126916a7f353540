"""Named places at which a process can be made to die, so that a test can see what a death there costs.

With `BONSAI_CRASH_AT=NAME` or `BONSAI_CRASH_AT=NAME:K` a process kills itself with SIGKILL when it passes the place
for the first, or the K-th, time: no handler runs, nothing is flushed, as after the OOM killer. With `BONSAI_FREEZE_AT`
it stops there instead (SIGSTOP), as on a machine that is suspended, until somebody sends SIGCONT. Without the variables
a place is two looks into the environment.

Owns the list of places: one on either side of every write that outlives a process, save for those that say when
something was last seen, which the next one replaces. Which write, its module says; that each place is reached and
survived, the two test_crash_points and test_archive_crashes say. Here because gateway and worker share nothing else.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Final, Literal, get_args

CRASH_AT: Final = "BONSAI_CRASH_AT"
FREEZE_AT: Final = "BONSAI_FREEZE_AT"

WorkerPoint = Literal[
    "claim.asked",
    "claim.granted",
    "beat.asked",
    "beat.kept",
    "progress.asked",
    "progress.recorded",
    "window.written",
    "window.renamed",
    "adapter.lent",
    "checkpoint.written",
    "checkpoint.renamed",
    "checkpoint.forgotten",
    "tell.asked",
    "tell.recorded",
    "report.written",
    "report.renamed",
    "policy.written",
    "policy.renamed",
    "finish.asked",
    "finish.recorded",
    "attempts.forgotten",
    "release.asked",
    "release.recorded",
    "park.asked",
    "park.recorded",
    "orphan.renamed",
    "report.removed",
]
"""In the order in which a job passes them; four only when it is given back, parked with its state or not, and two
when what others left is swept."""

GatewayPoint = Literal[
    "submit.asked",
    "submit.recorded",
    "wish.asked",
    "wish.recorded",
    "dispatch.marked",
    "dispatch.sent",
    "reconcile.asked",
    "reconcile.recorded",
    "record.asked",
    "record.renamed",
    "record.told",
    "file.settled",
    "file.recorded",
    "file.forgotten",
    "content.lost",
    "seed.asked",
    "seed.committed",
    "transaction.asked",
    "transaction.committed",
    "deletion.renamed",
    "journal.renamed",
    "reply.promised",
    "reply.kept",
    "spool.written",
    "drain.delivered",
    "drain.acknowledged",
    "webhook.due",
    "webhook.claimed",
    "webhook.answered",
    "webhook.settled",
]

ArchivePoint = Literal[
    "root.asked",
    "root.written",
    "batch.asked",
    "content.written",
    "batch.written",
    "manifest.written",
    "manifest.named",
    "batch.named",
    "batch.acknowledged",
    "stream.trimmed",
    "erasure.asked",
    "erasure.noted",
    "rewrite.written",
    "rewrite.named",
    "rewrite.removed",
    "superseded.removed",
    "answer.forgotten",
    "entry.removed",
    "targets.forgotten",
    "reply.removed",
    "job.failed",
    "policies.tainted",
    "erasure.told",
    "unfinished.removed",
    "content.removed",
    "sources.written",
    "erasure.recorded",
    "merge.written",
    "merge.named",
    "answers.forgotten",
]
"""In the order in which a compactor's turn passes them: a batch, an erasure, a merge, what is too old."""

CommandPoint = Literal["import.written", "import.renamed", "rebuild.asked", "rebuild.written"]
"""What an operator's commands pass."""

CrashPoint = WorkerPoint | GatewayPoint | ArchivePoint | CommandPoint
WORKER_POINTS: Final[tuple[WorkerPoint, ...]] = get_args(WorkerPoint)
GATEWAY_POINTS: Final[tuple[GatewayPoint, ...]] = get_args(GatewayPoint)
ARCHIVE_POINTS: Final[tuple[ArchivePoint, ...]] = get_args(ArchivePoint)
COMMAND_POINTS: Final[tuple[CommandPoint, ...]] = get_args(CommandPoint)

_passes: Final[Counter[str]] = Counter()


def crash_point(name: CrashPoint) -> None:
    """Pass the place called `name`; die or freeze there when that is asked for."""
    for variable, number in ((CRASH_AT, signal.SIGKILL), (FREEZE_AT, signal.SIGSTOP)):
        if (asked := os.environ.get(variable)) is not None:
            place, _, which = asked.partition(":")
            if place == name and _pass(variable) == int(which or 1):
                os.kill(os.getpid(), number)


def _pass(variable: str) -> int:
    _passes[variable] += 1
    return _passes[variable]
