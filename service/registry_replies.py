"""The form of the registry's replies, as JSON Schema.

Owns: the members of policies, tags, trials, lineages and entries of the audit. Does not own: filling them, the words
that they are written in (replies.py).
"""

from __future__ import annotations

from typing import Final

from bon_algos.contracts import EvaluationReport, FingerprintResult, Manifest, PolicyState
from service.lineage import EdgeKind, NodeKind
from service.replies import ARM_FIGURES, FLAG, NUMBER, TEXT, WHOLE, Named, kind, maybe, members, one_of, rows

POLICY: Final = Named(
    "Policy",
    members(
        id=TEXT,
        object=kind("bonsai.policy"),
        kind=TEXT,
        state=one_of(PolicyState),
        version=WHOLE,
        served=FLAG,
        created_at=NUMBER,
        n_equivalent=maybe(WHOLE),
        live_on=rows(TEXT),
        canary_on=rows(TEXT),
        shadow_on=rows(TEXT),
        tags=rows(TEXT),
        description=TEXT,
        is_protected=FLAG,
        tainted=FLAG,
        fingerprint=maybe(FingerprintResult),
        base_policy=TEXT,
        parents=rows(TEXT),
        job=maybe(TEXT),
        report=maybe(EvaluationReport),
        manifest=maybe(Manifest),
    ),
)
TAG: Final = Named("Tag", members(id=TEXT, object=kind("bonsai.tag"), policy=TEXT))
LINEAGE: Final = Named(
    "Lineage",
    members(
        object=kind("bonsai.lineage"),
        policy=TEXT,
        nodes=rows(members(id=TEXT, kind=one_of(NodeKind), says=TEXT)),
        edges=rows(members(source=TEXT, target=TEXT, kind=one_of(EdgeKind))),
    ),
)
TRIAL: Final = Named(
    "Trial",
    members(
        {"here": {"type": "object", "additionalProperties": WHOLE}},
        id=TEXT,
        share=NUMBER,
        since=NUMBER,
        arm=TEXT,
        policy=TEXT,
        is_silent=FLAG,
        **ARM_FIGURES,
    ),
)
TRIALS: Final = Named(
    "Trials", members(object=kind("bonsai.trials"), route=TEXT, canary=maybe(TRIAL), shadow=maybe(TRIAL))
)
AUDIT_ENTRY: Final = Named(
    "AuditEntry",
    members(
        id=TEXT,
        object=kind("bonsai.audit.entry"),
        event=TEXT,
        by=TEXT,
        at=NUMBER,
        about={"type": "object", "additionalProperties": TEXT},
        data={},
        previous=TEXT,
        digest=TEXT,
    ),
)
