"""What manifests cannot know, beside the artefacts: which policy is live where, states, tags, experiments.

Owns: the file `registry/journal.json`, when it is written, when it must not be. Does not own: reading Redis
(catalogue.py), restoring (`bonsai rebuild`).

The journal is of one registry, by its name. After Redis was lost the name is another one or none, and the journal is
left as it is: it is all that is known of what was.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from archive.storage import put_durably
from bon_algos.contracts import SCHEMA_VERSION, Experiment, PolicyRecord, Record, Route
from bon_algos.crash_points import crash_point
from service.catalogue import Catalogue, Snapshot
from service.durable_files import sole_writer

FILE: Final = Path("registry") / "journal.json"
"""Below the artefact directory."""
POLL_SECONDS: Final = 1.0
log = logging.getLogger("bonsai.journal")


class Journal(Record):
    """The registry at one moment, without the manifests, which stand beside the weights."""

    schema_version: int = SCHEMA_VERSION
    registry: str
    routes: tuple[Route, ...]
    experiments: tuple[Experiment, ...]
    policies: tuple[PolicyRecord, ...]
    """Without their manifests."""
    tags: dict[str, str]
    deleted: tuple[str, ...]


class UnreadableJournal(Exception):
    """The file is no journal; the text says which."""


def read_journal(artefacts: Path) -> Journal | None:
    """None where there is none yet. Raises UnreadableJournal, OSError."""
    try:
        return Journal.model_validate_json((artefacts / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UnreadableJournal(f"{artefacts / FILE} has {error.error_count()} faults") from error


def journal_of(snapshot: Snapshot, deleted: frozenset[str]) -> Journal:
    """deleted: those that the snapshot has forgotten."""
    return Journal(
        registry=snapshot.registry,
        routes=tuple(snapshot.routes[name] for name in sorted(snapshot.routes)),
        experiments=tuple(snapshot.experiments[name] for name in sorted(snapshot.experiments)),
        policies=tuple(
            snapshot.policies[policy_id].model_copy(update={"manifest": None})
            for policy_id in sorted(snapshot.policies)
        ),
        tags=dict(sorted(snapshot.tags.items())),
        deleted=tuple(sorted(deleted | snapshot.deleted)),
    )


class JournalWriter:
    """Keeps the journal of one artefact directory like the registry of one Redis."""

    def __init__(self, catalogue: Catalogue, artefacts: Path) -> None:
        self._catalogue = catalogue
        self._artefacts = artefacts
        self._written: Journal | None = None
        self._seen: Snapshot | None = None
        self._complaint = ""

    async def run(self) -> None:
        """Write what has changed until cancelled."""
        while True:
            try:
                await self.write()
            except (OSError, UnreadableJournal) as error:
                self._complain(f"the registry's journal could not be written: {error}")
            await asyncio.sleep(POLL_SECONDS)

    async def write(self) -> None:
        """Write the journal if the registry is another than when it was written. Raises OSError, UnreadableJournal."""
        snapshot = self._catalogue.snapshot
        if snapshot.registry == "" or not _differ(snapshot, self._seen):
            return
        if self._written is None or self._written.registry != snapshot.registry:
            self._written = await asyncio.to_thread(read_journal, self._artefacts)
        former = self._written
        if former is not None and former.registry != snapshot.registry:
            self._complain(
                f"ALERT Redis holds another registry than {FILE} is of: stop here and run `bonsai rebuild`, or remove "
                "the file to begin anew"
            )
            return
        journal = journal_of(snapshot, frozenset(() if former is None else former.deleted))
        if journal != former:
            await asyncio.to_thread(_write, self._artefacts / FILE, journal.model_dump_json(indent=1))
        self._written, self._seen, self._complaint = journal, snapshot, ""

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            log.error("%s", text)
        self._complaint = text


def _differ(new: Snapshot, old: Snapshot | None) -> bool:
    """Records that were not parsed again are the same objects, so this costs next to nothing."""
    told = ("routes", "experiments", "policies", "tags", "deleted", "registry")
    return old is None or any(getattr(new, name) != getattr(old, name) for name in told)


def _write(file: Path, text: str) -> None:
    """Whole or not at all, also after a power cut."""
    with sole_writer(file.parent):
        put_durably(file, text.encode())
        crash_point("journal.renamed")
