"""The lines of reliability.md 8.4 on the registry that are one request: what is sent, and what must come back.

Owns: the rows, each with the ids of its lines in front of its name. Does not own: sending them
(test_registry_routes.py), nor which line is tested where (test_bad_lines.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tests.service.bad_input import CANARY


@dataclass(frozen=True)
class RegistryRow:
    """One input to the registry. POLICY in the path is a candidate that no engine has proven."""

    name: str
    status: int
    param: str | None
    method: str
    path: str
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None

    @property
    def content(self) -> bytes | None:
        if self.method == "GET":
            return None
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


PROMOTE: Final = "/policies/POLICY/promote"
UNKNOWN_POLICY: Final = "pol-" + "9" * 16
LIVE: Final = {"override_reason": "r"}


def promoting(name: str, status: int, param: str | None, body: object, code: str | None = None) -> RegistryRow:
    return RegistryRow(name, status, param, "POST", PROMOTE, body, code=code)


def registry_get(name: str, status: int, param: str | None, path: str) -> RegistryRow:
    return RegistryRow(name, status, param, "GET", path)


REGISTRY = (
    RegistryRow("P1 an unknown policy", 404, None, "POST", f"/policies/{UNKNOWN_POLICY}/promote", LIVE),
    RegistryRow("P1 an unknown policy deleted", 404, None, "DELETE", f"/policies/{UNKNOWN_POLICY}"),
    RegistryRow("P29 an unknown policy changed", 404, None, "PATCH", f"/policies/{UNKNOWN_POLICY}", {}),
    promoting("P2 not proven", 409, None, LIVE, "fingerprint_missing"),
    promoting("P1 an unknown route", 404, "route", {**LIVE, "route": "nowhere"}),
    promoting("an unknown stage", 422, "stage", {"stage": CANARY}),
    promoting("P5 live without a reason", 409, None, {}, "fingerprint_missing"),
    promoting("P20 a canary without a share", 422, "share", {"stage": "canary"}),
    promoting("P20 a share for live", 422, "share", {**LIVE, "share": 0.5}),
    *(promoting(f"P20 a share of {share}", 422, "share", {"stage": "canary", "share": share})
      for share in (-1, 0, 0.51, 1.01, 101, "0.5", CANARY)),
    promoting("P20 a share that is no number", 400, None, b'{"stage": "canary", "share": NaN}'),
    promoting("P21 a canary not proven", 409, None, {"stage": "canary", "share": 0.1}, "fingerprint_missing"),
    promoting("who is replaced is no policy", 422, "replaces", {**LIVE, "replaces": CANARY}),
    promoting("P3 another is live", 409, "replaces", {**LIVE, "replaces": UNKNOWN_POLICY}, "route_moved"),
    promoting("a reason of 501 characters", 422, "override_reason", {"override_reason": "x" * 501}),
    promoting("an unknown member", 422, CANARY, {**LIVE, CANARY: 1}),
    RegistryRow("P4 another version", 412, "If-Match", "PATCH", "/policies/POLICY", {}, {"If-Match": '"77"'}),
    RegistryRow("P4 a weak version", 412, "If-Match", "POST", PROMOTE, LIVE, {"If-Match": 'W/"1"'}),
    RegistryRow("P4 a version without quotes", 400, "If-Match", "DELETE", "/policies/POLICY", None, {"If-Match": "1"}),
    RegistryRow("P4 a version of 2 kB", 400, "If-Match", "DELETE", "/policies/POLICY", None,
                {"If-Match": f'"{"1" * 2000}"'}),
    RegistryRow("P6 nothing to go back to", 409, None, "POST", "/routes/default/rollback", code="nothing_to_roll_back"),
    *(RegistryRow(f"a circle with {param} {value!r}", 422, param, "PUT", "/routes/default/circle", spec)
      for param, value, spec in (
          *((name, value, {name: value}) for name, value in (
              ("n", 1), ("n", 65), ("collect_share", 0), ("collect_share", 1.5), ("min_groups", 3), ("min_gain", -1),
              ("max_turns", 0), ("held_out_fraction", 1), ("seed", -1), ("turns", 3),
          )),
          ("budgets.max_kl", 0, {"budgets": {"max_kl": 0}}),
          ("budgets.jobs_per_day", 0, {"budgets": {"jobs_per_day": 0}}),
          ("shadow.share", 2, {"shadow": {"share": 2, "answers": 1}}),
          ("canary.answers", 0, {"canary": {"share": 0.1, "answers": 0}}),
          ("canary.share", 0.9, {"canary": {"share": 0.9, "answers": 1}}),
          ("gate.judge_margin", -1, {"gate": {"judge_margin": -1}}),
          ("method.token_bond.critic_share", 1, {"method": {"type": "token_bond",
                                                            "token_bond": {"critic_share": 1}}}),
          ("method.token_bond.value_weight", 0, {"method": {"type": "token_bond",
                                                            "token_bond": {"value_weight": -0.1}}}),
          ("method.offline_bond.lora_rank", 4096, {"method": {"type": "offline_bond",
                                                              "offline_bond": {"lora_rank": 4096}}}),
          ("method", "interpolation", {"method": {"type": "interpolation",
                                                  "interpolation": {"policy": UNKNOWN_POLICY, "share": 0.5}}}),
      )),
    RegistryRow("a circle of no route", 404, "route", "PUT", "/routes/nowhere/circle", {}),
    RegistryRow("no circle", 404, None, "POST", "/routes/default/circle/stop"),
    RegistryRow("no circle to delete", 404, None, "DELETE", "/routes/default/circle"),
    RegistryRow("P8 the base deleted", 404, None, "DELETE", "/policies/base"),
    RegistryRow("nothing to withdraw", 409, None, "POST", "/policies/POLICY/withdraw", {}, code="no_trial"),
    RegistryRow("P24 a description of 1 MB", 422, "description", "PATCH", "/policies/POLICY",
                {"description": "x" * 2**20}),
    RegistryRow("P24 protected by a word", 422, "is_protected", "PATCH", "/policies/POLICY", {"is_protected": "yes"}),
    RegistryRow("a state of one's own", 422, "state", "PATCH", "/policies/POLICY", {"state": "live"}),
    *(RegistryRow(f"P32 a digest {name}", 422, "digest", "POST", "/policies", {"digest": digest})
      for name, digest in {
          "in upper case": "A" * 64, "too short": "a" * 63, "no hexadecimal": "g" * 64, "with a path": "../" + "a" * 61,
          "that is nowhere": "a" * 64, "that is no text": 7,
      }.items()),
    RegistryRow("no digest", 422, "digest", "POST", "/policies", {}),
    *(RegistryRow(f"P17 P39 the tag {tag}", 422, "tag", "PUT", f"/tags/{tag}", {"policy": "POLICY"})
      for tag in ("latest", "base", "live", "Prod", "-a", "pol-1", "%D1%80%D0%BE1", "a" * 65)),
    RegistryRow("P18 P19 a tag that names a tag that is not there", 404, None, "PUT", "/tags/a", {"policy": "b"}),
    RegistryRow("P19 a tag that is not there", 404, None, "GET", "/tags/nothing"),
    RegistryRow("P19 the same, removed", 404, None, "DELETE", "/tags/nothing"),
    registry_get("P25 limit 0", 422, "limit", "/policies?limit=0"),
    registry_get("P25 limit -1", 422, "limit", "/policies?limit=-1"),
    registry_get("P25 limit 10^9", 422, "limit", "/policies?limit=1000000000"),
    registry_get("P25 a cursor of nobody", 422, "after", f"/policies?after={CANARY}"),
    registry_get("P26 an unknown order", 422, "sort", "/policies?sort=reward"),
    registry_get("an unknown state", 422, "state", f"/policies?state={CANARY}"),
    registry_get("an unknown route", 404, "route", f"/policies?route={CANARY}"),
    registry_get("an unknown form", 422, "format", f"/policies/POLICY/lineage?format={CANARY}"),
    registry_get("P13 a base outside", 422, "base", "/policies/POLICY/export?base=../../etc"),
    registry_get("files that are not there", 409, None, "/policies/POLICY/export"),
    registry_get("P38 a path as an id", 404, None, "/policies/%2e%2e%2fetc"),
    registry_get("P39 another alphabet's letters", 404, None, "/policies/%D1%80%D0%BE1"),
    registry_get("the audit's cursor", 422, "after", f"/audit?after={CANARY}"),
)  # fmt: skip
