"""What is known of the adapters of one engine: what it lists, what it proved, what failed and when that is tried again.

Owns: telling one life of an engine from the next, and what is forgotten with a life. Does not own: asking the engine
(publishing.py), deciding what to do (residency.py). No I/O; times are the monotonic clock's.

A proof holds for one life. Where the engine tells when its process started, another start is another life; where it
does not, so is any time out of reach and any name that is gone without our doing: a gateway beside us may have loaded
into the new life what the old one had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from bon_algos.contracts import FingerprintResult
from service.residency import Holding
from service.vllm import EngineState

LONGEST_PAUSE_SECONDS: Final = 60.0
REFUSED_PAUSE_SECONDS: Final = 30.0
LONGEST_REFUSED_PAUSE_SECONDS: Final = 600.0
OTHER_FILES: Final = "the engine was given other files under this name; they leave, and it has to start again"


class Verdict(NamedTuple):
    """What an engine found out about a policy."""

    result: FingerprintResult
    is_of_files: bool = False
    """The files themselves were refused: no other engine will see others."""


@dataclass
class Adapter:
    """What is known of one policy on one engine."""

    is_loaded: bool = False
    is_barred: bool = False
    """Not in this life of the engine: what it keeps of other weights under the name would be mixed with ours."""
    verdict: Verdict | None = None
    proven_at: float | None = None
    probed_at: float | None = None
    """When it was last tried, however it ended."""
    failures: int = 0
    """Since the last proof."""
    retry_at: float = 0.0
    leaves_at: float | None = None
    reason: str = ""
    """Why it is not served, as far as it is known."""

    def passed(self, verdict: Verdict, now: float) -> None:
        self.verdict, self.proven_at, self.probed_at = verdict, now, now
        self.failures, self.retry_at, self.reason = 0, 0.0, ""

    def refused(self, verdict: Verdict, now: float, *, for_life: bool) -> None:
        """for_life: it is not tried again before the engine's next start."""
        self._failed(verdict.result.reason, now)
        self.verdict, self.proven_at, self.is_barred = verdict, None, for_life
        self.retry_at = now + min(LONGEST_REFUSED_PAUSE_SECONDS, REFUSED_PAUSE_SECONDS * 2.0 ** (self.failures - 1))

    def could_not(self, reason: str, now: float) -> None:
        """Neither proved nor disproved. The first time it is tried again in the next round, then after 1, 3, 7, … s."""
        self._failed(reason, now)
        self.retry_at = now + min(LONGEST_PAUSE_SECONDS, 2.0 ** (self.failures - 1) - 1)

    def left(self) -> None:
        """The engine has it no longer."""
        self.is_loaded, self.proven_at, self.leaves_at = False, None, None

    def _failed(self, reason: str, now: float) -> None:
        self.probed_at, self.reason = now, reason
        self.failures = min(self.failures + 1, 32)


class Observed:
    """The adapters of one engine that are policies of ours; a job's rollouts are nobody's business."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.models: frozenset[str] = frozenset()
        """All that it listed last."""
        self.started_at: float | None = None
        """Unix seconds."""
        self._was_away = False

    def __getitem__(self, policy: str) -> Adapter:
        return self.adapters.setdefault(policy, Adapter())

    @property
    def verdicts(self) -> dict[str, Verdict]:
        return {name: one.verdict for name, one in self.adapters.items() if one.verdict is not None}

    def lost_sight(self) -> None:
        self._was_away = True

    def see(self, state: EngineState, directories: Mapping[str, str], wanted: Iterable[str]) -> None:
        """What it lists now. directories: of each policy there is, where its files are and nowhere else."""
        if self._is_another_life(state):
            self._forget_life()
        self.models = frozenset(state.models)
        for policy in self.adapters.keys() - self.models:
            self.adapters[policy].left()
        for policy in directories.keys() & self.models:
            self._see_loaded(policy, state.models[policy], directories[policy])
        remembered = frozenset(wanted)
        self.adapters = {
            name: one for name, one in self.adapters.items() if one.is_loaded or one.is_barred or name in remembered
        }

    def _see_loaded(self, policy: str, found: str | None, directory: str) -> None:
        adapter = self[policy]
        adapter.is_loaded = True
        if found is not None and found != directory:
            adapter.is_barred, adapter.proven_at, adapter.reason = True, None, OTHER_FILES

    def holdings(self, in_flight: Mapping[str, int], used_at: Mapping[str, float]) -> dict[str, Holding]:
        return {
            name: Holding(
                name,
                is_loaded=one.is_loaded,
                is_barred=one.is_barred,
                proven_at=one.proven_at,
                retry_at=one.retry_at,
                in_flight=in_flight.get(name, 0),
                last_used_at=used_at.get(name, 0.0),
                leaves_at=one.leaves_at,
            )
            for name, one in self.adapters.items()
        }

    def _is_another_life(self, state: EngineState) -> bool:
        before, was_away = self.started_at, self._was_away
        self.started_at, self._was_away = state.started_at or before, False
        if before is not None and state.started_at is not None:
            return state.started_at != before
        return was_away or any(one.is_loaded and name not in state.models for name, one in self.adapters.items())

    def _forget_life(self) -> None:
        for name, one in self.adapters.items():
            of_files = one.verdict if one.verdict is not None and one.verdict.is_of_files else None
            self.adapters[name] = Adapter(
                is_barred=of_files is not None, verdict=of_files, reason="" if of_files is None else one.reason
            )
