"""`/v1/files`: with OpenAI's client, with forms of all kinds, and what of a file is there while and after."""

from __future__ import annotations

import io
import socket
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import openai
import pytest
import redis as blocking_redis

from bon_algos.contracts import job_key, jobs_index
from tests.fixtures.gateway import Client, Reply, World, gateway_settings, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.bad_training_data import NO_FORMAT, SERVED
from tests.service.training_files import BOUNDARY, FORM, form, line, part, uploaded
from tests.stubs.server import running

LIMIT = 100_000
SPEC = {"method": {"type": "bon_sft", "bon_sft": {"n": 2}}, "n": 2}


@pytest.fixture
def world(tmp_path, engine, reward, redis_url):
    """A gateway that takes files of 100 kB."""
    with running(engine.app()) as engine_url, running(reward.app()) as reward_url:
        settings = gateway_settings(tmp_path, engine_url, reward_url, redis_url, file_max_bytes=LIMIT)
        with running_gateway(settings) as client:
            yield World(client, engine, reward, redis_url)


def stored(tmp_path: Path, tenant: str = "default") -> list[Path]:
    return sorted((tmp_path / "artefacts" / "files" / tenant).glob("*"))


def refusal(reply: Reply, status: int) -> str:
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/problem+json"
    return str(reply.json["error"]["param"])


# --- OpenAI's client -------------------------------------------------------------------------------------


def test_openais_client_uploads_lists_reads_and_deletes(world, tmp_path):
    host, port = world.client.address
    client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=world.client.key, max_retries=0)
    content = line() + line(id="b")
    made = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(content), "rows.jsonl", "fine-tune")
    assert (made.status, made.status_details) == ("processed", None)
    assert client.files.retrieve(made.id) == made
    second = client.files.create(file=io.BytesIO(SERVED["Parquet"]()), purpose="fine-tune")
    assert [one.id for one in client.files.list()] == [second.id, made.id]
    assert [one.id for one in client.files.list(limit=1, order="asc")] == [made.id, second.id]
    assert client.files.list(purpose="assistants").data == []
    assert client.files.content(made.id).read() == content
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert [path.name[:64] for path in stored(tmp_path)] == [sha256(SERVED["Parquet"]()).hexdigest()]


def test_a_file_with_faults_is_kept_and_tells_them(world):
    reply = uploaded(world.client, line() + line(rewards=[1.0]))
    assert reply.status == 200
    assert reply.json["status"] == "error"
    assert reply.json["status_details"] == "line 2: has 1 rewards for 2 completions"
    assert reply.json["bonsai"]["rows"] == 1
    assert world.client.get(f"/v1/files/{reply.json['id']}").json == reply.json
    job = world.client.post("/distill", {**SPEC, "training_file": reply.json["id"]})
    assert refusal(job, 422) == "training_file"
    assert job.json["error"]["code"] == "file_unusable"


def test_the_same_content_is_the_same_file_of_each_tenant(world, tmp_path):
    first, again = uploaded(world.client, line()), uploaded(world.client, line(), filename="other.jsonl")
    assert first.json == again.json
    assert first.json["id"] == f"file-{sha256(line()).hexdigest()[:32]}"
    assert len(stored(tmp_path)) == 1
    key = world.client.post("/keys", {"name": "a", "role": "admin", "tenant": "acme"}).json["key"]
    acme = world.client.with_key(key)
    assert acme.get(f"/v1/files/{first.json['id']}").status == 404
    theirs = uploaded(acme, line())
    assert theirs.json["id"] == first.json["id"]
    assert acme.request("DELETE", f"/v1/files/{first.json['id']}").status == 200
    assert world.client.get(f"/v1/files/{first.json['id']}/content").body == line()
    assert (len(stored(tmp_path)), stored(tmp_path, "acme")) == (1, [])


# --- jobs ------------------------------------------------------------------------------------------------


def test_a_file_that_a_job_learns_from_is_not_deleted(world):
    file = uploaded(world.client, line()).json["id"]
    job = world.client.post("/distill", {**SPEC, "training_file": file})
    assert (job.status, job.json["training_file"]) == (202, file)
    refused = world.client.request("DELETE", f"/v1/files/{file}")
    assert refused.status == 409
    assert refused.json["error"]["code"] == "file_in_use"
    assert job.json["id"] in refused.json["detail"]
    assert world.client.post(f"/distill/{job.json['id']}/pause", {}).json["status"] == "paused"
    assert world.client.request("DELETE", f"/v1/files/{file}").status == 409
    assert world.client.post(f"/distill/{job.json['id']}/cancel", {}).status == 200
    assert world.client.request("DELETE", f"/v1/files/{file}").status == 200
    assert refusal(world.client.post("/distill", {**SPEC, "training_file": file}), 404) == "training_file"


def test_another_tenants_job_holds_no_file(world):
    """Theirs may be of the same content, and so of the same name."""
    file = uploaded(world.client, line()).json["id"]
    job = world.client.post("/distill", {**SPEC, "training_file": file}).json["id"]
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        store.hset(job_key(job), "tenant", "acme")
        store.zrem(jobs_index(), job)
        store.zadd(jobs_index("acme"), {job: 1})
    assert world.client.request("DELETE", f"/v1/files/{file}").status == 200


# --- forms -----------------------------------------------------------------------------------------------

FILE = part("file", line(), "f.jsonl")
PURPOSE = part("purpose", b"fine-tune")
BAD_FORMS = {
    "no file": (form(PURPOSE), 422, "file"),
    "a file without a name": (form(PURPOSE, part("file", line())), 422, "file"),
    "a name that is a directory": (form(PURPOSE, part("file", line(), "../..")), 422, "file"),
    "no purpose": (form(FILE), 422, "purpose"),
    "another purpose": (form(part("purpose", b"assistants"), FILE), 422, "purpose"),
    "two purposes": (form(PURPOSE, PURPOSE, FILE), 422, "purpose"),
    "two files": (form(PURPOSE, FILE, FILE), 422, "file"),
    "a purpose of 10 KB": (form(part("purpose", b"x" * 10_240), FILE), 422, "purpose"),
    "an unknown field": (form(PURPOSE, part("tenant", b"acme"), FILE), 422, "tenant"),
    "no end": (form(PURPOSE, FILE)[:-10], 400, "None"),
    "no form": (line(), 400, "None"),
    "empty": (b"", 400, "None"),
    "100 headers of a part": (form(PURPOSE, b"--" + BOUNDARY.encode() + b"\r\n" + b"a: b\r\n" * 100), 400, "None"),
}


@pytest.mark.parametrize(("body", "status", "param"), BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_a_form_that_is_none_is_refused(still_world, body, status, param):
    reply = still_world.client.request("POST", "/v1/files", body, FORM)
    assert refusal(reply, status) == param
    assert still_world.client.get("/v1/files").json["data"] == []


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "multipart/mixed; boundary=x", ""])
def test_another_media_type_is_415(still_world, kind):
    reply = still_world.client.request("POST", "/v1/files", form(PURPOSE, FILE), {"Content-Type": kind})
    assert refusal(reply, 415) == "None"


def test_C31_a_compressed_form_is_415(still_world):
    reply = uploaded(still_world.client, line(), {**FORM, "Content-Encoding": "gzip"})
    assert refusal(reply, 415) == "None"


def test_a_format_that_is_none_leaves_nothing_behind(world, tmp_path):
    for content in NO_FORMAT.values():
        assert refusal(uploaded(world.client, content()), 422) == "file"
    assert stored(tmp_path) == []


def test_a_filename_is_a_label_for_people(world, tmp_path):
    reply = uploaded(world.client, line(), filename="../../etc/pass\twd;x=1.jsonl")
    assert reply.json["filename"] == "pass_wd;x=1.jsonl"
    assert [path.name[:64] for path in stored(tmp_path)] == [sha256(line()).hexdigest()]
    content = world.client.get(f"/v1/files/{reply.json['id']}/content")
    assert content.headers["content-disposition"] == "attachment; filename*=UTF-8''pass_wd%3Bx%3D1.jsonl"


# --- too large, and never whole --------------------------------------------------------------------------


def head(client: Client, length: str) -> bytes:
    written = client.written("POST", "/v1/files", b"", length)
    return written.replace(b"Content-Type: application/json", f"Content-Type: {FORM['Content-Type']}".encode())


def sent_slowly(client: Client, length: str, *pieces: bytes) -> bytes:
    with socket.create_connection(client.address, timeout=10) as connection:
        connection.sendall(head(client, length))
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
        return connection.recv(65_536)


def test_L36_more_than_the_limit_is_413_before_the_body_is_there(world, tmp_path):
    assert sent_slowly(world.client, f"Content-Length: {10**9}").startswith(b"HTTP/1.1 413 ")
    assert stored(tmp_path) == []


def test_L36_more_than_the_limit_in_chunks_is_413_and_leaves_nothing(world, tmp_path):
    start = form(PURPOSE, part("file", line(), "f.jsonl"))[: -len(BOUNDARY) - 8]
    chunk = b"10000\r\n" + b"a" * 65_536 + b"\r\n"
    first = f"{len(start):x}\r\n".encode() + start + b"\r\n"
    answer = sent_slowly(world.client, "Transfer-Encoding: chunked", first, *[chunk] * 20)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert stored(tmp_path) == []


def test_a_file_of_exactly_the_limit_is_taken(world):
    content = line(prompt="p") * (LIMIT // len(line()))
    content += b" " * (LIMIT - len(content))
    assert uploaded(world.client, content).json["bytes"] == LIMIT
    assert refusal(uploaded(world.client, content + b" "), 413) == "file"


def test_a_client_that_goes_away_leaves_nothing(world, tmp_path):
    with socket.create_connection(world.client.address, timeout=10) as connection:
        connection.sendall(head(world.client, "Content-Length: 5000") + form(PURPOSE, FILE)[:50])
        wait_until(lambda: len(stored(tmp_path)) == 1)
    wait_until(lambda: stored(tmp_path) == [])


def test_openais_body_names_a_file_and_may_ask_what_it_would_teach(world):
    file = uploaded(world.client, b"".join(line(prompt=f"p{i}") for i in range(8))).json["id"]
    asked = {"model": "default", "training_file": file, "method": SPEC["method"]}
    told = world.client.post("/v1/fine_tuning/jobs?dry_run=true", asked)
    assert (told.status, told.json["object"]) == (200, "bonsai.dry_run")
    assert (told.json["spec"]["training_file"], told.json["data"]["groups_read"]) == (file, 8)
    assert world.client.get("/distill").json["data"] == []
    job = world.client.post("/v1/fine_tuning/jobs", asked)
    assert (job.status, job.json["training_file"], job.json["bonsai"]["spec"]["training_file"]) == (200, file, file)
    assert refusal(world.client.post("/v1/fine_tuning/jobs", {**asked, "training_file": "f-1"}), 422) == "training_file"
    gone = {**asked, "training_file": "file-" + "0" * 32}
    assert refusal(world.client.post("/v1/fine_tuning/jobs", gone), 404) == "training_file"
