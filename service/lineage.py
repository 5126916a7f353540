"""What a policy was made from and what was made from it: a graph, as JSON, Mermaid or DOT.

Owns: the nodes and edges, and the three forms. Does not own: the records. Pure functions of a snapshot.
Every edge leads from what was there first to what was made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

from bon_algos.contracts import Manifest, PolicyRecord

NodeKind = Literal["base", "policy", "deleted", "job", "window", "reward_model", "import"]
EdgeKind = Literal["base", "parent", "learned_from", "window", "reward_model", "made", "imported"]
Form = Literal["json", "mermaid", "dot"]
MEDIA_TYPES: Final[Mapping[Form, str]] = {
    "json": "application/json",
    "mermaid": "text/vnd.mermaid",
    "dot": "text/vnd.graphviz",
}
FORMS: Final = get_args(Form)


class Node(NamedTuple):
    id: str
    kind: NodeKind
    says: str = ""
    """In a few words what it is: a state, a method."""


class Edge(NamedTuple):
    source: str
    target: str
    kind: EdgeKind


class Lineage(NamedTuple):
    policy: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def lineage_of(policy_id: str, policies: Mapping[str, PolicyRecord]) -> Lineage:
    """The ancestors and descendants of a policy, each with its job, data, method and reward model."""
    kin = _reached(policy_id, {one: record.parents for one, record in policies.items()})
    kin |= _reached(policy_id, _children(policies))
    nodes = {one: _node_of(one, policies) for one in sorted(kin)}
    edges: dict[Edge, None] = {}
    for one in sorted(kin):
        record = policies.get(one)
        if record is not None and record.manifest is not None:
            for node, edge in _made_by(record.manifest):
                nodes.setdefault(node.id, _node_of(node.id, policies) if node.kind == "policy" else node)
                edges[edge] = None
    return Lineage(policy_id, tuple(nodes.values()), tuple(edges))


def _children(policies: Mapping[str, PolicyRecord]) -> dict[str, frozenset[str]]:
    children: dict[str, set[str]] = {}
    for one, record in policies.items():
        for parent in record.parents:
            children.setdefault(parent, set()).add(one)
    return {one: frozenset(found) for one, found in children.items()}


def _reached(start: str, leads_to: Mapping[str, frozenset[str]]) -> set[str]:
    found, waiting = {start}, [start]
    while waiting:
        further = leads_to.get(waiting.pop(), frozenset()) - found
        found |= further
        waiting += further
    return found


def _node_of(policy_id: str, policies: Mapping[str, PolicyRecord]) -> Node:
    record = policies.get(policy_id)
    if record is None:
        return Node(policy_id, "deleted")
    return Node(policy_id, "base" if record.kind == "base" else "policy", record.state)


def _made_by(manifest: Manifest) -> Iterator[tuple[Node, Edge]]:
    """Everything that one policy was made of."""
    own = manifest.policy_id
    maker = Node(own, "policy")
    if manifest.imported is not None:
        source = Node(f"import-{manifest.imported.source_digest[:16]}", "import", f"by {manifest.imported.by}")
        yield source, Edge(source.id, own, "imported")
    if manifest.job_id is not None:
        method = "" if manifest.spec is None else f"{manifest.spec.method.type} n={manifest.spec.n}"
        maker = Node(manifest.job_id, "job", method)
        yield maker, Edge(maker.id, own, "made")
    base = manifest.base_policy_id
    yield Node(base, "policy"), Edge(base, maker.id, "base")
    if manifest.parent_policy_id != base:
        yield Node(manifest.parent_policy_id, "policy"), Edge(manifest.parent_policy_id, maker.id, "parent")
    for other in () if manifest.spec is None else manifest.spec.window.policies:
        yield Node(other, "policy"), Edge(other, maker.id, "learned_from")
    if manifest.data is not None:
        window = Node(f"window-{manifest.data.digest[:16]}", "window", f"{manifest.data.groups} groups")
        yield window, Edge(window.id, maker.id, "window")
    if manifest.reward_model_id is not None:
        yield Node(manifest.reward_model_id, "reward_model"), Edge(manifest.reward_model_id, maker.id, "reward_model")


def lineage_object(lineage: Lineage) -> dict[str, Any]:
    """The lineage of the API."""
    return {
        "object": "bonsai.lineage",
        "policy": lineage.policy,
        "nodes": [node._asdict() for node in lineage.nodes],
        "edges": [edge._asdict() for edge in lineage.edges],
    }


def mermaid(lineage: Lineage) -> str:
    """For Markdown pages."""
    place = {node.id: f"n{i}" for i, node in enumerate(lineage.nodes)}
    lines = [f'  {place[node.id]}["{_label(node, "<br>")}"]' for node in lineage.nodes]
    lines += [f"  {place[edge.source]} -->|{edge.kind}| {place[edge.target]}" for edge in lineage.edges]
    return "\n".join(["graph TD", *lines, f"  style {place[lineage.policy]} stroke-width:3px", ""])


def dot(lineage: Lineage) -> str:
    """For Graphviz."""
    lines = [f'  "{node.id}" [label="{_label(node, chr(92) + "n")}"];' for node in lineage.nodes]
    lines += [f'  "{edge.source}" -> "{edge.target}" [label="{edge.kind}"];' for edge in lineage.edges]
    return "\n".join(["digraph lineage {", *lines, "}", ""])


def _label(node: Node, newline: str) -> str:
    said = "".join(letter for letter in node.says if letter.isalnum() or letter in " .=_-@")
    return newline.join(part for part in (node.kind, node.id, said) if part)
