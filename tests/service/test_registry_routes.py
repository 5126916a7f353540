"""The registry over HTTP: versions, tags, trials, lineage, export, import, deletion, audit, and bad requests."""

from __future__ import annotations

import json
import struct
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import redis as blocking_redis

from bon_algos.contracts import (
    ADAPTER_FILES,
    POLICIES_INDEX,
    Fingerprint,
    Imported,
    Manifest,
    PolicyRecord,
    adapter_digest,
    policy_key,
)
from bonsai.registry.auditing import verified_audit
from service.export import unpack
from tests.fixtures.gateway import Client, Reply, World
from tests.fixtures.waiting import wait_until
from tests.service.bad_input import CANARY
from tests.service.bad_registry_input import REGISTRY, RegistryRow
from tests.service.published import safetensors, write_full_policy, write_policy
from tests.service.records import BASE, policy

TYPED = {"Content-Type": "application/json"}


def send(client: Client, method: str, path: str, body: object = None, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request(method, path, json.dumps(body).encode(), {**TYPED, **named})


def files(number: float, logprob: float = -0.5) -> dict[str, bytes]:
    """Of an adapter of its own, whose trainer saw what the stub will answer."""
    fingerprint = Fingerprint(
        prompt_token_ids=((1, 2),) * 5,
        completion_token_ids=((1,) * 64,) * 5,
        policy_logprobs=((logprob,) * 64,) * 5,
        base_logprobs=((-1.5,) * 64,) * 5,
    )
    return {
        "fingerprint.json": fingerprint.model_dump_json().encode(),
        "adapter_model.safetensors": safetensors(struct.pack("<4f", number, 0, 0, 0)),
    }


def proven(world: World, root: Path, number: float) -> str:
    written = write_policy(root / "artefacts", files(number))
    register(world, policy(written.policy_id, fingerprint=None, created_at=number, written=written))
    wait_until(lambda: is_proven(world.client, written.policy_id))
    return written.policy_id


def register(world: World, record: PolicyRecord) -> None:
    with blocking_redis.Redis.from_url(world.redis_url) as client:
        client.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        client.zadd(POLICIES_INDEX, {record.id: record.created_at})


def is_proven(client: Client, policy_id: str) -> bool:
    found = client.get(f"/policies/{policy_id}").json
    return bool(found.get("served") and found.get("fingerprint"))


def test_a_policy_is_tried_promoted_named_and_deleted(world: World, tmp_path: Path):
    first, second = proven(world, tmp_path, 1.0), proven(world, tmp_path, 2.0)
    client = world.client
    tagged = send(client, "PUT", "/tags/prod", {"policy": first})
    assert (tagged.status, tagged.headers["etag"]) == (201, f'"{first}"')

    seen = client.get("/policies/prod")
    assert (seen.json["id"], seen.json["tags"], seen.headers["etag"]) == (first, ["prod"], f'"{seen.json["version"]}"')
    shadow = send(client, "POST", "/policies/prod/promote", {"stage": "shadow", "share": 1.0})
    assert (shadow.status, shadow.json["shadow"]["policy"]) == (200, first)
    stale = send(client, "POST", "/policies/prod/retire", None, if_match=seen.headers["etag"])
    assert (stale.status, stale.json["error"]["code"]) == (412, "precondition_failed")
    assert client.get(f"/policies/{first}").json["shadow_on"] == ["default"]

    served = client.post("/generate", {"prompt": "p", "n": 2}).json
    assert served["arm"] == f"{BASE}:2"
    groups = {group.id: group for group in world.groups(2)}
    shadowed = groups[f"shadow_{served['id']}"]
    assert (str(shadowed.arm), shadowed.arm_reason) == (f"{first}:1", "shadow")
    wait_until(lambda: client.get("/routes/default/trials").json["shadow"]["scored"] == 1)
    told = client.get("/routes/default/trials").json["shadow"]
    assert (told["exposures"], told["answers"], told["is_silent"]) == (1, 1, False)
    assert told["here"] == {"given": 1, "answered": 1}

    canary = send(client, "POST", f"/policies/{second}/promote", {"stage": "canary", "share": 0.5})
    assert canary.json["canary"]["policy"] == second
    units = [client.post("/generate", {"prompt": "p", "unit": f"u{i}"}).json for i in range(24)]
    reasons = [one["arm_reason"] for one in units]
    assert 0 < reasons.count("canary") < 24
    assert {one["arm"] for one in units if one["arm_reason"] == "canary"} == {f"{second}:1"}
    wait_until(lambda: client.get("/routes/default/trials").json["canary"]["answers"] == reasons.count("canary"))

    rows = {state: client.get(f"/policies?state={state}").json["data"] for state in ("shadow", "canary", "candidate")}
    assert [[row["id"] for row in found] for found in rows.values()] == [[first], [second], []]
    assert [row["id"] for row in client.get("/policies?tag=prod").json["data"]] == [first]
    assert [row["id"] for row in client.get(f"/policies?parent={BASE}").json["data"]] == [second, first]
    assert {row["id"] for row in client.get("/policies?route=default").json["data"]} == {second, first, BASE}

    live = send(client, "POST", "/policies/prod/promote", {"override_reason": "r", "replaces": None})
    assert (live.json["live_policy"], live.json["shadow"]) == (first, None)
    raced = send(client, "POST", f"/policies/{second}/promote", {"override_reason": "r", "replaces": None})
    assert (raced.status, raced.json["error"]["code"]) == (409, "route_moved")
    assert send(client, "POST", f"/policies/{second}/withdraw", {}).status == 200
    assert client.get(f"/policies/{second}").json["state"] == "candidate"

    refused = send(client, "DELETE", f"/policies/{first}")
    assert (refused.status, len(refused.json["reasons"])) == (409, 2)
    assert send(client, "DELETE", f"/policies/{second}").status == 204
    assert client.get(f"/policies/{second}").status == 404
    wait_until(lambda: second not in world.engine.script.models)
    assert len(list((tmp_path / "artefacts" / "policies").iterdir())) == 1

    entries = client.get("/audit?limit=100").json["data"]
    events = [row["event"] for row in entries]
    assert [one for one in events if one != "tag_put"] == [
        "shadow_start", "canary_start", "promote", "canary_stop", "policy_delete",
    ]  # fmt: skip
    assert {row["by"] for row in entries} == {client.get("/keys").json["data"][0]["id"]}
    with blocking_redis.Redis.from_url(world.redis_url, decode_responses=True) as store:
        assert verified_audit(store).digest == entries[-1]["digest"]


def test_a_policy_goes_out_as_a_peft_directory_and_its_story_as_a_graph(world: World, tmp_path: Path):
    student = proven(world, tmp_path, 1.0)
    reply = world.client.get(f"/policies/{student}/export?base=owner/model")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-tar")
    assert int(reply.headers["content-length"]) == len(reply.body)
    with tarfile.open(fileobj=BytesIO(reply.body)) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert set(found) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "owner/model"
    assert found["adapter_model.safetensors"] == files(1.0)["adapter_model.safetensors"]
    assert b'base_model: "owner/model"' in found["README.md"]
    assert world.client.get(f"/policies/{BASE}/export").json["error"]["code"] == "policy_is_base"
    [directory] = (tmp_path / "artefacts" / "policies").iterdir()
    (directory / "adapter_model.safetensors").write_bytes(b"other")
    assert world.client.get(f"/policies/{student}/export").json["error"]["code"] == "files_damaged"

    graph = world.client.get(f"/policies/{student}/lineage")
    assert {node["id"] for node in graph.json["nodes"]} >= {student, BASE, "job_1"}
    mermaid = world.client.get(f"/policies/{student}/lineage?format=mermaid")
    assert mermaid.headers["content-type"].startswith("text/vnd.mermaid")
    assert mermaid.body.startswith(b"graph TD")
    assert world.client.get(f"/policies/{student}/lineage?format=dot").body.startswith(b"digraph")


def test_a_policy_of_full_weights_goes_out_as_the_model_directory_that_it_is(world: World, tmp_path: Path):
    written = write_full_policy(tmp_path / "artefacts")
    register(world, written.as_candidate())
    wait_until(lambda: world.client.get(f"/policies/{written.policy_id}").status == 200)
    reply = world.client.get(f"/policies/{written.policy_id}/export?base=owner/model")
    assert (reply.status, int(reply.headers["content-length"])) == (200, len(reply.body))
    archive = tmp_path / "policy.tar"
    archive.write_bytes(reply.body)
    unpack(archive, tmp_path / "out")
    directory = tmp_path / "artefacts" / "policies" / written.digest
    own = {name: (directory / name).read_bytes() for name in written.files}
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    card = found.pop("README.md").decode()
    assert found == own
    assert "library_name: transformers" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    (directory / "model.safetensors").write_bytes(b"other")
    assert world.client.get(f"/policies/{written.policy_id}/export").json["error"]["code"] == "files_damaged"


def imported(root: Path, number: float = 1.0, contents: dict[str, bytes] | None = None, **changes: object) -> Manifest:
    """What `bonsai policies import` leaves below the artefact root."""
    facts = {"imported": Imported(by="ann", source_digest="f" * 64, n=4), "job_id": None, "spec": None, "data": None}
    written = write_policy(root / "artefacts", {**files(number), **(contents or {})})
    update = {**facts, "report": None, "reward_model_id": None, **changes}
    manifest = written.model_copy(update=update)
    directory = root / "artefacts" / "policies" / written.digest
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def test_an_imported_policy_is_proven_like_any_other(world: World, tmp_path: Path):
    manifest = imported(tmp_path)
    registered = send(world.client, "POST", "/policies", {"digest": manifest.digest})
    assert (registered.status, registered.headers["location"]) == (201, f"/policies/{manifest.policy_id}")
    assert (registered.json["state"], registered.json["n_equivalent"], registered.json["report"]) == (
        "candidate", 4, None,
    )  # fmt: skip
    wait_until(lambda: is_proven(world.client, manifest.policy_id))
    again = send(world.client, "POST", "/policies", {"digest": manifest.digest})
    assert (again.status, again.json["error"]["code"]) == (409, "policy_exists")
    assert send(world.client, "DELETE", f"/policies/{manifest.policy_id}").status == 204
    back = imported(tmp_path)
    gone = send(world.client, "POST", "/policies", {"digest": back.digest})
    assert (gone.status, gone.json["error"]["code"]) == (409, "policy_deleted")
    lies = imported(tmp_path, 2.0, files(2.0, logprob=-1.4))
    send(world.client, "POST", "/policies", {"digest": lies.digest})
    wait_until(lambda: world.client.get(f"/policies/{lies.policy_id}").json["state"] == "failed")
    refused = send(world.client, "POST", f"/policies/{lies.policy_id}/promote", {"override_reason": "r"})
    assert (refused.status, refused.json["error"]["code"]) == (409, "policy_unusable")


# --- bad input -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def candidate(still_world: World) -> str:
    """A policy that no engine has."""
    record = policy("pol-" + "1" * 16, fingerprint=None)
    with blocking_redis.Redis.from_url(still_world.redis_url) as store:
        store.hset(policy_key(record.id), mapping={"record": record.model_dump_json(), "version": 1})
        store.zadd(POLICIES_INDEX, {record.id: 1.0})
    wait_until(lambda: still_world.client.get(f"/policies/{record.id}").status == 200)
    return record.id


@pytest.mark.parametrize("row", REGISTRY, ids=[row.name for row in REGISTRY])
def test_it_is_refused_with_its_status_and_field(still_world: World, candidate: str, row: RegistryRow):
    path, headers = row.path.replace("POLICY", candidate), dict(row.headers)
    reply = still_world.client.request(row.method, path, row.content, {**TYPED, **headers})
    assert (reply.status, reply.json["error"]["param"]) == (row.status, row.param), reply.body
    if row.code is not None:
        assert reply.json["error"]["code"] == row.code
    assert len(reply.body) <= 4096
    assert row.param == CANARY or CANARY.encode() not in reply.body


BAD_FILES = {
    "P11 a pickle beside it": ({}, lambda d: (d / "adapter_model.bin").write_bytes(b"\x80\x04."), "not allowed"),
    "P10 a link": ({}, lambda d: link(d / "adapter_model.safetensors"), "not a plain file"),
    "P14 another digest": ({}, lambda d: (d / "adapter_config.json").write_text("{}"), "digest of the manifest"),
    "P14 no manifest": ({}, lambda d: (d / "manifest.json").unlink(), "files missing"),
    "a file of 0 bytes": ({"adapter_model.safetensors": b""}, None, "longer than the file"),
    "a file that was cut": ({"adapter_model.safetensors": safetensors()[:-1]}, None, "end of the file"),
    "P12 not a number": (
        {"adapter_model.safetensors": safetensors(struct.pack("<4f", 1, 2, 3, float("nan")))}, None, "not finite",
    ),
    "P13 a rank above the limit": (
        {"adapter_config.json": json.dumps({"peft_type": "LORA", "r": 64}).encode()}, {"lora_rank": 64}, "engine's 32",
    ),
    "P13 another base": ({}, {"base_policy_id": "pol-" + "9" * 16}, "another base"),
    "P14 another tenant's": ({}, {"tenant": "acme"}, "tenant's"),
    "P14 a job's": ({}, {"imported": None}, "a job made it"),
}  # fmt: skip


def link(file: Path) -> None:
    file.rename(file.parents[2] / "weights")
    file.symlink_to(file.parents[2] / "weights")


def test_what_is_below_the_root_and_not_right_is_refused(world: World, tmp_path: Path):
    for number, (name, (contents, harm, why)) in enumerate(BAD_FILES.items()):
        changes = harm if isinstance(harm, dict) else {}
        manifest = imported(tmp_path, 10.0 + number, contents, **changes)
        directory = tmp_path / "artefacts" / "policies" / manifest.digest
        if callable(harm):
            harm(directory)
        reply = send(world.client, "POST", "/policies", {"digest": manifest.digest})
        assert (reply.status, reply.json["error"]["code"]) == (422, "adapter_refused"), name
        assert reply.json["error"]["param"] == "digest"
        assert why in reply.json["detail"], (name, reply.json["detail"])
        directory.rename(tmp_path / f"done-{number}")
    assert [row["id"] for row in world.client.get("/policies").json["data"]] == [BASE]
    assert world.engine.script.models == [BASE]


def test_every_file_of_an_adapter_is_named_by_its_digest(tmp_path: Path):
    manifest = imported(tmp_path)
    assert set(manifest.files) == set(ADAPTER_FILES)
    assert manifest.digest == adapter_digest(manifest.files)
