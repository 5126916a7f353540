"""Lines of reliability.md 8.3, 8.4 and 8.5 that one request to the control plane can have.

Owns: the rows, each with the ids of its lines in front of its name, where this API has the field. Does not own: sending
them (test_admin_routes.py), and that no line is forgotten (test_bad_lines.py). More rows of 8.3 are in
bad_training_data.py, of 8.4 in bad_input.py.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tests.service.records import BASE


class Asked(NamedTuple):
    name: str
    method: str
    path: str
    body: object
    status: int


def method(**parameters: object) -> dict[str, object]:
    return {"method": {"type": "jbond", "jbond": parameters}}


def job(name: str, body: object, status: int = 422) -> Asked:
    return Asked(name, "POST", "/distill", body, status)


def of_method(line: str, field: str, *values: object) -> tuple[Asked, ...]:
    return tuple(job(f"{line} {field} {value!r}", method(**{field: value})) for value in values)


def with_member(line: str, field: str, *values: object) -> tuple[Asked, ...]:
    return tuple(job(f"{line} {field} {str(value)[:20]!r}", {**method(), field: value}) for value in values)


def got(name: str, path: str, status: int) -> Asked:
    return Asked(name, "GET", path, None, status)


ARMS: Final = [{"policy": "base", "n": 16, "weight": 5000}, {"policy": "base", "n": 4, "weight": 5000}]
JOBS: Final = ("/distill", "/v1/fine_tuning/jobs")
NO_POLICY: Final = "pol-" + "9" * 16
NO_JOB: Final = "job_" + "0" * 32
DISTILL: Final = (
    job("D1 no method", {}),
    job("D1 an unknown one", {"method": {"type": "ppo"}}),
    job("D1 another one's parameters", {"method": {"type": "jbond", "bon_forward_kl": {}}}),
    *with_member("D2", "n", 1, 65),
    *with_member("D48", "n", "16", True, 16.0),
    *of_method("D4", "jeffreys_weight", -0.1),
    *of_method("D4", "kl_strength", 1e9),
    job("D4 NaN", b'{"method": {"type": "jbond", "jbond": {"kl_strength": NaN}}}', 400),
    job("D4 1e400", b'{"method": {"type": "jbond", "jbond": {"kl_strength": 1e400}}}'),
    *of_method("D5", "learning_rate", 0, -1, 10),
    *of_method("D6", "steps", 0, -1, 10**12),
    *of_method("D7", "prompts_per_step", 0, 1, 10**6),
    *of_method("D8", "lora_rank", 0, 7, 64, 10**4),
    *of_method("D9", "lora_alpha", 0),
    *of_method("D10", "target_modules", ["../x"], [], ["(a+)+$"]),
    job("D11 D44 a window of an empty ledger", method()),
    *with_member("D12", "window", {"since": 2.0, "until": 1.0}),
    *with_member("D13", "window", {"since": 1e12}),
    *with_member("D14", "window", {"since": "2026-11-20"}, {"since": "12026-11-20T00:00:00"}, {"since": -1}),
    *with_member("no group", "window", {"max_groups": 0}),
    *with_member("D17", "dataset", "file:///etc/passwd", "s3://other", "hf://x"),
    *with_member("D19 not one's own to say", "base_policy", "hf-user/repo"),
    *with_member("D20 not one's own to say", "reward_model", "../rm"),
    *with_member("C68", "tenant", "other"),
    *with_member("C68", "state", "succeeded"),
    *with_member("C68", "epoch", 1),
    *with_member("D23", "held_out_fraction", 0, 1, -0.5),
    *with_member("D24", "seed", -1, 2**64),
    *with_member("D25", "suffix", "../p", "", "x" * 300, "é", "🦊", "a\nb"),
    *with_member("D25", "route", "../x"),
    job("an unknown route", {**method(), "route": "nowhere"}, 404),
    *with_member("D26 nothing goes live by its job", "publish", True),
    *with_member("D27", "gpus", 10**6, -1, "all"),
    *with_member("D28", "priority", "urgent", "", 10**6, None),
    *with_member("D29", "schedule", "* * * * * *"),
    *with_member("D30 no job has one of its own", "webhook", "http://169.254.169.254/"),
    *with_member("D31", "extra_args", ["--trust-remote-code"]),
    *with_member("D31", "env", {"LD_PRELOAD": "x"}),
    *with_member("D32", "trust_remote_code", True),
    *with_member("D33 D34 a job goes on from its own states alone", "resume_from", f"{NO_JOB}:step-20"),
    Asked("D43 a dry run that publishes", "POST", "/distill?dry_run=true", {**method(), "publish": True}, 422),
    job("D47 YAML", b"method: &m !!python/object/apply:os.system [id]\nwindow: *m\n", 400),
    job("D49 3 MB", {**method(), "suffix": "x" * 3 * 2**20}),
    Asked("an unknown parameter", "POST", "/distill?x=1", method(), 422),
    got("D37 an unknown id", f"/distill/{NO_JOB}", 404),
    got("D38 a star", "/distill/*", 404),
    got("D38 a path", "/distill/..%2fdefault", 404),
    got("D38 a long one", "/distill/" + "a" * 9000, 404),
    got("D37 its events", f"/distill/{NO_JOB}/events", 404),
    got("D37 its events from nowhere", f"/distill/{NO_JOB}/events?after=x", 404),
    *(
        Asked(f"D37 {wish}", "POST", f"{jobs}/{NO_JOB}/{wish}", None, 404)
        for jobs in JOBS
        for wish in ("pause", "resume", "cancel")
    ),
    *(
        got(f"D37 {part}", f"{jobs}/{NO_JOB}/{part}", 404)
        for jobs in JOBS
        for part in ("checkpoints", "events?stream=true")
    ),
    *with_member("C61", "metadata", {f"k{i}": "v" for i in range(17)}, {"k": "v" * 513}),
    Asked("C14 a job is not deleted", "DELETE", f"/distill/{NO_JOB}", None, 405),
    *(
        got(f"a limit of {limit}", f"/distill?limit={limit}", 422)
        for limit in ("0", "-1", "101", "1e1", "", "x", "%D9%A1")
    ),
    got("a cursor of nobody", "/distill?after=job_x", 422),
    got("a limit twice", "/distill?limit=1&limit=2", 422),
)
POLICIES: Final = (
    got("P1 an unknown policy", f"/policies/{NO_POLICY}", 404),
    got("P38 a path", "/policies/%2e%2e", 404),
    got("P17 latest", "/policies/latest", 404),
    got("P25 a cursor of nobody", "/policies?after=x", 422),
    got("its report", f"/policies/{NO_POLICY}/report", 404),
    got("the base's report", f"/policies/{BASE}/report", 404),
    got("an unknown form", f"/policies/{BASE}/report?format=pdf", 422),
    got("P26 an unknown order", "/policies?sort=x", 422),
    Asked("P1 promoted", "POST", f"/policies/{NO_POLICY}/promote", {"override_reason": "r"}, 404),
    Asked("the base promoted", "POST", f"/policies/{BASE}/promote", {"override_reason": "r"}, 409),
    Asked("without a reason", "POST", f"/policies/{BASE}/promote", {"override_reason": ""}, 409),
    Asked("with a blank one", "POST", f"/policies/{BASE}/promote", {"override_reason": " "}, 409),
    Asked("with a long one", "POST", f"/policies/{BASE}/promote", {"override_reason": "x" * 501}, 422),
    Asked("of no route", "POST", f"/policies/{BASE}/promote", {"override_reason": "r", "route": "nowhere"}, 404),
    Asked("P20 101 %", "POST", f"/policies/{BASE}/promote", {"override_reason": "r", "share": 101}, 422),
    Asked("with nothing", "POST", f"/policies/{BASE}/promote", {}, 409),
    Asked("a number for a reason", "POST", f"/policies/{BASE}/promote", {"override_reason": 1}, 422),
    Asked("C44 empty", "POST", f"/policies/{BASE}/promote", b"", 400),
    Asked("P8 the base deleted", "DELETE", f"/policies/{BASE}", None, 409),
    Asked("P6 nothing to go back to", "POST", "/routes/default/rollback", None, 409),
    Asked("of no route", "POST", "/routes/nowhere/rollback", None, 404),
)
ROUTES: Final = (
    Asked("in upper case", "PUT", "/routes/UPPER", {}, 422),
    Asked("P39 another alphabet's letters", "PUT", "/routes/ро1", {}, 422),
    Asked("C68 what is live", "PUT", "/routes/x", {"live_policy": BASE}, 422),
    Asked("above the cap", "PUT", "/routes/x", {"n_cap": 65}, 422),
    Asked("n of 0", "PUT", "/routes/x", {"default_n": 0}, 422),
    Asked("a quorum above n", "PUT", "/routes/x", {"quorum": 65}, 422),
    Asked("no time", "PUT", "/routes/x", {"deadline_ms": 0}, 422),
    Asked("an unknown strategy", "PUT", "/routes/x", {"strategy": "eager"}, 422),
    Asked("a share of no strategy", "PUT", "/routes/x", {"kept_gain": 0.9}, 422),
    Asked("more than all", "PUT", "/routes/x", {"strategy": "distilled_first", "kept_gain": 1.1}, 422),
    Asked("D19 a base that is not served", "PUT", "/routes/x", {"base_policy": "hf-user/repo"}, 422),
    Asked("D20 an address", "PUT", "/routes/x", {"reward_model": "http://169.254.169.254/"}, 422),
    Asked("D20 a path", "PUT", "/routes/x", {"reward_model": "../rm"}, 422),
    got("an unknown route", "/routes/nowhere", 404),
    Asked("an unknown route deleted", "DELETE", "/routes/nowhere", None, 404),
)


def arms(name: str, *found: object, **more: object) -> Asked:
    return Asked(name, "PUT", "/experiments/default", {"arms": list(found), **more}, 422)


EXPERIMENTS: Final = (
    Asked("X1 nothing", "PUT", "/experiments/default", {}, 422),
    arms("X1 no arms"),
    arms("X2 one arm", ARMS[0]),
    arms("X3 the same twice", ARMS[0], ARMS[0]),
    arms("X4 eleven", *({**ARMS[0], "n": n + 1, "weight": 909} for n in range(11))),
    *(
        arms(f"X5 a weight of {weight!r}", {**ARMS[0], "weight": weight}, ARMS[1])
        for weight in (-1, 0, 4999, 5000.0, "5000", 10_001, True)
    ),
    arms("X6 an unknown policy", {**ARMS[0], "policy": NO_POLICY}, ARMS[1]),
    arms("X6 the live one", {**ARMS[0], "policy": "live"}, ARMS[1]),
    arms("X16 an n of 0", {**ARMS[0], "n": 0}, ARMS[1]),
    arms("X22 a salt of one's own", *ARMS, salt="mine"),
    arms("X12 an alpha of one's own", *ARMS, alpha=0.05),
    Asked("on no route", "PUT", "/experiments/nowhere", {"arms": ARMS}, 404),
    got("none runs", "/experiments/default", 404),
    Asked("X25 none to stop", "DELETE", "/experiments/default", None, 404),
)
BAD: Final = (*DISTILL, *POLICIES, *ROUTES, *EXPERIMENTS)
