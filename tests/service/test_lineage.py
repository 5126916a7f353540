"""What a policy was made from and what from it."""

from __future__ import annotations

from bon_algos.contracts import Imported, PolicyRecord
from service.lineage import dot, lineage_object, lineage_of, mermaid
from tests.service.records import BASE, REWARD_MODEL, job_spec, manifest, numbered, policy

CHILD, GRANDCHILD, OTHER, FOREIGN = numbered(1), numbered(2), numbered(3), numbered(4)


def made(policy_id: str, parent: str = BASE, learned_from: tuple[str, ...] = ()) -> PolicyRecord:
    spec = job_spec(window={"policies": list(learned_from)})
    update = {"parent_policy_id": parent, "job_id": f"job_of_{policy_id}", "spec": spec}
    return policy(policy_id, written=manifest(policy_id).model_copy(update=update))


def family() -> dict[str, PolicyRecord]:
    records = [policy(BASE), made(CHILD), made(GRANDCHILD, CHILD, (OTHER,)), made(OTHER)]
    return {one.id: one for one in records}


def test_a_lineage_has_ancestors_jobs_data_and_reward_model():
    found = lineage_of(GRANDCHILD, family())
    kinds = {node.id: node.kind for node in found.nodes}
    assert kinds[BASE] == "base"
    assert {kinds[one] for one in (CHILD, GRANDCHILD, OTHER)} == {"policy"}
    assert (kinds[f"job_of_{GRANDCHILD}"], kinds[REWARD_MODEL]) == ("job", "reward_model")
    edges = {(edge.source, edge.target, edge.kind) for edge in found.edges}
    job = f"job_of_{GRANDCHILD}"
    assert {
        (CHILD, job, "parent"),
        (OTHER, job, "learned_from"),
        (BASE, job, "base"),
        (job, GRANDCHILD, "made"),
    } <= edges
    assert ("window-", job, "window") in edges


def test_a_lineage_has_descendants_and_nobody_elses():
    assert {node.id for node in lineage_of(CHILD, family()).nodes} >= {GRANDCHILD}
    without = lineage_of(CHILD, {one: record for one, record in family().items() if one != GRANDCHILD})
    assert OTHER not in {node.id for node in without.nodes}


def test_a_parent_that_was_deleted_is_still_named():
    left = {one: record for one, record in family().items() if one != CHILD}
    assert {node.id: node.kind for node in lineage_of(GRANDCHILD, left).nodes}[CHILD] == "deleted"


def test_an_import_says_whose_it_was_and_has_no_job():
    imported = Imported(by="ann", source_digest="f" * 64, n=4)
    facts = {"imported": imported, "job_id": None, "spec": None, "data": None, "reward_model_id": None}
    record = policy(FOREIGN, written=manifest(FOREIGN).model_copy(update=facts))
    found = lineage_of(FOREIGN, {BASE: policy(BASE), FOREIGN: record})
    assert {(edge.source, edge.kind) for edge in found.edges} == {("import-" + "f" * 16, "imported"), (BASE, "base")}


def test_the_three_forms_say_the_same():
    found = lineage_of(CHILD, family())
    shown = lineage_object(found)
    assert len(shown["edges"]) == mermaid(found).count("-->") == dot(found).count("->")
    assert all(f'"{node["id"]}" [label=' in dot(found) for node in shown["nodes"])
    assert all(node["id"] in mermaid(found) for node in shown["nodes"])


def test_nothing_that_a_person_wrote_ends_a_label():
    imported = Imported(by='"]; evil --> x <script>', source_digest="f" * 64, n=4)
    record = policy(FOREIGN, written=manifest(FOREIGN).model_copy(update={"imported": imported}))
    found = lineage_of(FOREIGN, {BASE: policy(BASE), FOREIGN: record})
    for text in (mermaid(found), dot(found)):
        assert "script>" not in text
        assert '"];' not in text.replace('"];\n', "")
