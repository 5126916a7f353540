"""A policy's report over HTTP: in the form a caller likes best, as it was written, and not at all otherwise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis as blocking_redis

from bon_algos.contracts import (
    POLICIES_INDEX,
    REPORT_FILES,
    Interval,
    Manifest,
    MaybeSides,
    PolicyReport,
    Sides,
    policy_key,
    report_digest,
)
from bon_algos.contracts.reports import (
    Cost,
    FrontierPoint,
    HeldOut,
    Lengths,
    Refusals,
    Rewards,
    Standing,
)
from service.errors import NotAcceptable, ReportNotFound
from service.report_files import wanted_format, with_report
from tests.fixtures.gateway import World
from tests.fixtures.waiting import wait_until
from tests.service.records import BASE, REWARD_MODEL, STUDENT, manifest, policy
from tests.service.test_openapi import as_described

POINT = Interval(mean=0.0, low=0.0, high=0.0)
PATH = f"/policies/{STUDENT}/report"


def a_report() -> PolicyReport:
    """With every member, all numbers nought."""
    rewards = Rewards(
        reward_model_id=REWARD_MODEL, policy=POINT, reference=POINT, best_of_n=POINT, gain=POINT, gain_share=None
    )
    return PolicyReport(
        policy_id=STUDENT, base_policy_id=BASE, parent_policy_id=BASE, job_id="job_1", route="default", method="bond",
        created_at=0.0, seed=0, n=2, intervals="",
        held_out=HeldOut(
            prompts=2, samples_per_prompt=2, reference_draws=(2, 2), trained_prompts=2, ancestors=(), seen_in_training=0
        ),
        reward=rewards, judge=rewards, judge_note="", win_rate_reference=POINT, win_rate_best_of_n=POINT,
        kl_policy_reference=POINT, log_quantile=Sides(policy=POINT, reference=POINT),
        lengths=Lengths(
            policy=POINT, reference=POINT, best_of_n=POINT, difference=POINT, p90_policy=0.0, p90_reference=0.0
        ),
        distinct=(MaybeSides(policy=None, reference=POINT),), finish_reasons_policy={"stop": 1.0},
        finish_reasons_reference={"stop": 1.0}, refusals_policy=Refusals(share=None, judged=0, unjudged=4),
        refusals_reference=Refusals(share=POINT, judged=4, unjudged=0),
        cost=Cost(generated_policy=1.0, generated_best_of_n=2.0, scored_best_of_n=4.0, cheaper=2.0),
        frontier=(FrontierPoint(k=1, reward=POINT, win_rate=POINT, kl=0.0, kl_bound=0.0, judge=None),),
        standing=Standing(frontier_kl=None, kl_ratio=None, note="words"),
    )  # fmt: skip


CONTENTS = {
    "README.md": b"---\nlibrary_name: peft\n---\n# A policy\n",
    "report.json": a_report().model_dump_json(indent=1).encode() + b"\n",
    "report.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}


def register(world: World, written: Manifest, tenant: str = "default") -> None:
    record = policy(STUDENT, written=written).model_copy(update={"tenant": tenant})
    with blocking_redis.Redis.from_url(world.redis_url) as store:
        store.hset(policy_key(STUDENT), mapping={"record": record.model_dump_json(), "version": 1})
        store.zadd(POLICIES_INDEX, {STUDENT: 1.0})
    wait_until(lambda: world.client.get(f"/policies/{STUDENT}").status == 200)


@pytest.fixture(scope="module")
def root(still_world: World) -> Path:
    """The artefacts, with the report of a policy that is registered."""
    artefacts = Path(urlsplit(still_world.redis_url).path).parent / "artefacts"
    directory = artefacts / "reports" / report_digest(DIGESTS)
    directory.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (directory / name).write_bytes(content)
    register(still_world, manifest().model_copy(update={"report_files": DIGESTS}))
    return directory


FORMS = [("json", "application/json"), ("markdown", "text/markdown; charset=utf-8"), ("png", "image/png")]


@pytest.mark.parametrize(("form", "media"), FORMS)
@pytest.mark.parametrize("by", ["query", "header"])
def test_each_form_is_the_file_as_it_was_written(still_world: World, root: Path, form: str, media: str, by: str):
    asked = {"query": (f"{PATH}?format={form}", "*/*"), "header": (PATH, media.partition(";")[0])}
    path, accept = asked[by]
    reply = still_world.client.request("GET", path, None, {"Accept": accept})
    name = {"json": "report.json", "markdown": "README.md", "png": "report.png"}[form]
    assert (reply.status, reply.headers["content-type"], reply.body) == (200, media, CONTENTS[name])
    assert reply.headers["etag"] == f'"{DIGESTS[name]}"'
    assert reply.headers["vary"] == "Accept"


def test_the_json_is_as_the_document_describes_it(still_world: World, root: Path):
    told = as_described("GET", "/policies/{policy_id}/report", still_world.client.get(PATH))
    assert PolicyReport.model_validate(told) == a_report()
    assert set(DIGESTS) == set(REPORT_FILES)


def test_a_tag_stands_for_the_policy_that_it_names(still_world: World, root: Path):
    body = json.dumps({"policy": STUDENT}).encode()
    put = still_world.client.request("PUT", "/tags/prod", body, {"Content-Type": "application/json"})
    assert put.status == 201
    wait_until(lambda: still_world.client.get("/policies/prod/report").status == 200)
    assert still_world.client.get("/policies/prod/report").body == CONTENTS["report.json"]


def test_an_import_has_no_report():
    with pytest.raises(ReportNotFound, match="base and imported policies have none"):
        with_report(manifest().model_copy(update={"job_id": None, "spec": None, "report": None}))


@pytest.mark.parametrize("known", [f'"{DIGESTS["report.json"]}"', f'"x", W/"{DIGESTS["report.json"]}"', "*"])
def test_who_has_it_is_told_so(still_world: World, root: Path, known: str):
    reply = still_world.client.request("GET", PATH, None, {"If-None-Match": known})
    assert (reply.status, reply.body) == (304, b"")
    assert reply.headers["etag"] == f'"{DIGESTS["report.json"]}"'
    other = still_world.client.request("GET", f"{PATH}?format=png", None, {"If-None-Match": f'"{"0" * 64}"'})
    assert other.status == 200


@pytest.mark.parametrize(
    ("path", "headers", "status", "code", "param"),
    [
        (PATH, {"Accept": "text/html"}, 406, "not_acceptable", "Accept"),
        (PATH, {"Accept": "application/json;q=0"}, 406, "not_acceptable", "Accept"),
        (f"{PATH}?format=pdf", {}, 422, "invalid_field", "format"),
        (f"{PATH}?format=", {}, 422, "invalid_field", "format"),
        (f"{PATH}?format=json&format=png", {}, 422, "invalid_field", "format"),
        (f"{PATH}?page=2", {}, 422, "unknown_field", "page"),
        (f"/policies/{BASE}/report", {}, 404, "report_not_found", None),
        ("/policies/pol-ffffffffffffffff/report", {}, 404, "policy_not_found", None),
        ("/policies/..%2f..%2fetc/report", {}, 404, None, None),
    ],
)
def test_what_is_asked_wrongly_is_refused_by_name(still_world, root, path, headers, status, code, param):
    reply = still_world.client.request("GET", path, None, headers)
    assert reply.status == status
    assert reply.json["error"]["param"] == param
    assert code in (None, reply.json["error"]["code"])


def test_a_file_that_is_not_the_registered_one_is_no_report(still_world: World, root: Path, tmp_path: Path):
    """Changed, replaced by a link to the very same bytes, gone: the others are served all the while."""
    figure, elsewhere = root / "report.png", tmp_path / "elsewhere.png"
    elsewhere.write_bytes(CONTENTS["report.png"])
    for damage in ("other bytes", "a link", "gone", "a directory"):
        figure.unlink(missing_ok=True)
        if damage == "other bytes":
            figure.write_bytes(b"other")
        elif damage == "a link":
            figure.symlink_to(elsewhere)
        elif damage == "a directory":
            figure.mkdir()
        reply = still_world.client.get(f"{PATH}?format=png")
        assert (reply.status, reply.json["error"]["code"]) == (404, "report_not_found")
        assert still_world.client.get(PATH).status == 200
    figure.rmdir()
    figure.write_bytes(CONTENTS["report.png"])


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("text/markdown", "markdown"),
        ("image/*, */*;q=0.1", "png"),
        ("application/json;q=0.2, text/markdown;q=0.7, image/png;q=0.5", "markdown"),
        ("application/*;q=1, application/json;q=0, text/*;q=0.001", "markdown"),
        ("Application/JSON; charset=utf-8", "json"),
        ("text/html,application/xhtml+xml,image/avif,image/webp,image/png,*/*;q=0.8", "png"),
        ("nonsense, text/markdown;q=nonsense", "markdown"),
    ],
)
def test_the_form_that_is_liked_best_is_taken(accept: str, form: str):
    assert wanted_format(accept) == form


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "nonsense", "*/*;q=0.000"])
def test_what_takes_none_of_the_forms_is_told_which_there_are(accept: str):
    with pytest.raises(NotAcceptable, match="application/json, text/markdown, image/png"):
        wanted_format(accept)


def test_a_report_that_is_registered_without_its_files_does_not_exist(world: World):
    """Before a policy is published nothing is registered; a record that names files of others names no report."""
    for files in ({}, {"report.json": "a" * 64}, DIGESTS):
        register(world, manifest().model_copy(update={"report_files": files}))
        wait_until(lambda: world.client.get(f"/policies/{STUDENT}").json["manifest"]["report_files"] == files)  # noqa: B023
        assert json.loads(world.client.get(PATH).body)["error"]["code"] == "report_not_found"
