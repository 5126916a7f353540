"""Tables, claims and figures of what was measured.

Owns no measurement (load.py, stays.py) and no form of a claim (benchmarks/claims.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from benchmarks.claims import Claim, at_least, at_most
from benchmarks.gateway.load import Latencies, Saturation
from benchmarks.gateway.stays import Stays
from benchmarks.gateway.stub import TOKENS, N

QUANTILES: Final = (0.5, 0.99, 0.999)
MOST_GROWTH_MB: Final = 1.0
"""Over 10,000 requests: 100 bytes of each, and a group is more than a hundred times as large."""
COLUMNS: Final = (
    f"best of {N}", "requests/s", "calls alone ms, p50", "added ms, p50", "p99", "p99.9", "failed",
    "generator late ms, p99",
)  # fmt: skip
SATURATED_COLUMNS: Final = (
    f"best of {N}", "requests/s", "failed", "core busy, %", "CPU ms each", "requests per core·s",
)  # fmt: skip
STAYS_COLUMNS: Final = ("of a request", "bytes")
PER_CORE: Final[Mapping[str, float]] = {"LiteLLM": 8, "optillm": 8}
"""How often a peer's requests per core·s ours have to be, by how its name begins. TensorZero's are told and no claim:
it is written in Rust, and keeps neither keys nor a ledger here."""


class Measured(NamedTuple):
    name: str
    rate: float
    alone: Latencies
    """Of the same calls of engines, made directly at the same rate before and after."""
    latencies: Latencies
    saturation: Saturation | None
    """None where only latency was measured."""

    def added(self, quantile: float) -> float:
        """Milliseconds: a quantile less the same quantile of the calls alone."""
        return self.latencies.at(quantile) - self.alone.at(quantile)

    @property
    def failed(self) -> int:
        return self.latencies.failed + (0 if self.saturation is None else self.saturation.failed)


class Found(NamedTuple):
    ours: list[Measured]
    """`/generate` at the full rate first."""
    peers: list[Measured]
    absent: dict[str, str]
    """Peers that did not run, and why."""
    stays: Stays


def rows_of(found: Found) -> list[tuple[str, ...]]:
    return [_row(one) for one in (*found.ours, *found.peers)]


def _row(one: Measured) -> tuple[str, ...]:
    shown = [f"{milliseconds:.2f}" for milliseconds in (one.alone.at(0.5), *map(one.added, QUANTILES))]
    late = f"{one.latencies.late_at(0.99):.1f}"
    return one.name, f"{one.rate:.3g}", *shown, str(one.latencies.failed), late


def saturated_rows_of(found: Found) -> list[tuple[str, ...]]:
    return [
        (
            one.name,
            f"{spent.per_second:.0f}",
            str(spent.failed),
            f"{100 * spent.busy:.0f}",
            f"{spent.cpu_milliseconds:.2f}",
            f"{spent.per_core_second:.0f}",
        )
        for one in (*found.ours, *found.peers)
        if (spent := one.saturation) is not None
    ]


def stays_of(stays: Stays) -> list[tuple[str, ...]]:
    ledger, grown = stays.ledger, stays.slope
    (first, before), (last, after) = stays.memory[0], stays.memory[-1]
    return [
        ("the group as JSON", f"{ledger.as_json:.0f}"),
        ("the group in the gateway's spool", f"{ledger.in_spool:.0f}"),
        ("the group in the ledger, compressed", f"{ledger.compressed:.0f}"),
        ("the group in Redis, with its share of the stream", f"{ledger.in_redis:.0f}"),
        (f"MB of memory more for 10,000 requests, second half of {last}", f"{grown.mean:.2f}"),
        ("its 95 % interval", f"{grown.low:.2f} – {grown.high:.2f}"),
        (f"its resident MB after {first} and after {last} requests", f"{before:.0f} · {after:.0f}"),
    ]


def claims_of(found: Found) -> list[Claim]:
    best_of, *_ = found.ours
    claims = [
        at_most(f"added by /generate at {best_of.rate:.3g}/s, p50, ms", best_of.added(0.5), 2),
        at_most("the same, p99, ms", best_of.added(0.99), 6),
        at_most("requests that were not answered", sum(one.failed for one in found.ours), 0),
        *claims_of_stays(found.stays),
    ]
    for name, times in PER_CORE.items():
        for peer in found.peers:
            if peer.name.startswith(name) and peer.saturation is not None and best_of.saturation is not None:
                ratio = best_of.saturation.per_core_second / peer.saturation.per_core_second
                claims.append(at_least(f"requests per core·s ÷ those of {name}", ratio, times))
    return claims


def claims_of_stays(stays: Stays) -> list[Claim]:
    return [
        at_most("memory, MB more for 10,000 requests, upper 95 % bound", stays.slope.high, MOST_GROWTH_MB),
        at_most("requests not answered meanwhile", stays.failed, 0),
    ]


def figures_of(found: Found) -> dict[str, object]:
    return {
        "n": N,
        "tokens_each": TOKENS,
        "ours": [_figures(one) for one in found.ours],
        "peers": [_figures(one) for one in found.peers],
        "absent": found.absent,
        **figures_of_stays(found.stays),
    }


def figures_of_stays(stays: Stays) -> dict[str, object]:
    return {
        "ledger_bytes_per_group": stays.ledger._asdict(),
        "memory_mb_per_10000_requests": stays.slope.model_dump(),
        "memory_mb": stays.memory,
    }


def _figures(one: Measured) -> dict[str, object]:
    spent = one.saturation
    told = None if spent is None else {**spent._asdict(), "per_second": spent.per_second, "busy": spent.busy}
    return {
        "name": one.name,
        "rate": one.rate,
        "alone_ms": _quantiles(one.alone),
        "ms": _quantiles(one.latencies),
        "late_ms": {str(q): one.latencies.late_at(q) for q in QUANTILES},
        "failed": one.failed,
        "saturation": told,
    }


def _quantiles(latencies: Latencies) -> Mapping[str, float | None]:
    """Null where nothing was answered."""
    return {str(q): latencies.at(q) if latencies.milliseconds else None for q in QUANTILES}


def absence_of(absent: Mapping[str, str]) -> Sequence[str]:
    return [f"{name} was not measured: {reason}" for name, reason in absent.items()]
