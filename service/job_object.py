"""Jobs, their events and their checkpoints as the API shows them: OpenAI's objects, ours under `bonsai`.

Owns: how a job's hash, an entry of its events and a kept state become JSON. Does not own: reading them (jobs.py), who
may see them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from pydantic import ValidationError

from bon_algos.contracts import FINAL_JOB_STATES, InterpolationSpec, JobSpec
from service.training_file import LEDGER, name_of

SHOWN_REASON: Final = 300
"""Characters of what an attempt died of that fit into an event's message."""

_STATES: Final = {
    "queued": "The job is queued.",
    "running": "Attempt {attempt} has begun.",
    "paused": "The job is paused; its state is kept.",
    "succeeded": "The job has succeeded.",
    "failed": "The job has failed; its error says why.",
    "cancelled": "The job is cancelled.",
}


class _Asked(NamedTuple):
    """What was asked for, as a job shows it."""

    route: str
    members: dict[str, Any]
    spec: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> _Asked:
        try:
            return cls.of(JobSpec.model_validate_json(text))
        except ValidationError:
            return cls.as_written(_read(text))

    @classmethod
    def of(cls, spec: JobSpec) -> _Asked:
        members = {
            "training_file": name_of(spec),
            "method": {"type": spec.method.type, spec.method.type: spec.method.spec.model_dump(mode="json")},
            "hyperparameters": _hyperparameters(spec),
            "seed": spec.seed,
            "metadata": spec.metadata,
        }
        return cls(spec.route, members, spec.model_dump(mode="json"))

    @classmethod
    def as_written(cls, spec: dict[str, Any]) -> _Asked:
        """Of another version, so nobody here knows what its members mean: a job is shown, paused and cancelled all the
        same."""
        route = str(spec.get("route", ""))
        members = {
            "training_file": spec.get("training_file") or f"{LEDGER}{route}",
            "method": spec.get("method", {}),
            "hyperparameters": {},
            "seed": spec.get("seed", 0),
            "metadata": spec.get("metadata", {}),
        }
        return cls(route, members, spec)


def job_object(job_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The job of the API from the hash in Redis."""
    asked = _Asked.read(fields["spec"])
    state, is_running = fields["state"], fields["state"] == "running"
    trained = int(fields.get("trained_tokens", 0))
    return {
        "id": job_id,
        "object": "fine_tuning.job",
        "status": state,
        "created_at": _whole(fields, "created_at"),
        "finished_at": _whole(fields, "finished_at"),
        "estimated_finish": _whole(fields, "estimated_finish") if is_running else None,
        "model": fields.get("model") or asked.route,
        "fine_tuned_model": fields.get("policy_id") or None,
        **asked.members,
        "validation_file": None,
        "result_files": [],
        "organization_id": fields["tenant"],
        "trained_tokens": trained if state in FINAL_JOB_STATES else None,
        "integrations": [],
        "error": _error_object(fields),
        "bonsai": {
            "phase": fields.get("phase", "queued"),
            "stopping": _stopping(fields) if is_running else None,
            "step": int(fields.get("step", 0)),
            "steps": int(fields.get("steps", 0)),
            "metrics": _metrics(fields),
            "seconds": int(fields.get("spent_ms", 0)) / 1000,
            "gpu_seconds": _gpu_seconds(fields),
            "seconds_left": _number(fields, "seconds_left") if is_running else None,
            "tokens": {"trained": trained, "sampled": int(fields.get("sampled_tokens", 0))},
            "attempts": int(fields.get("attempts", 0)),
            "started_at": _number(fields, "started_at"),
            "spec": asked.spec,
            "report": json.loads(fields["report"]) if fields.get("report") else None,
        },
    }


def event_object(event_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    metrics = _metrics(fields)
    return {
        "id": event_id,
        "object": "fine_tuning.job.event",
        "created_at": int(event_id.split("-")[0]) // 1000,
        "level": "error" if fields.get("state") == "failed" else "warn" if "given_back" in fields else "info",
        "message": _message(fields),
        "type": "metrics" if metrics else "message",
        "data": {
            "phase": fields.get("phase"),
            "status": fields.get("state"),
            "step": int(fields["step"]) if "step" in fields else None,
            "metrics": metrics,
        },
    }


def checkpoint_object(job_id: str, step: str, kept: str) -> dict[str, Any]:
    """A state that the job could go on from. No engine serves it: its name says whose it is."""
    found = _read(kept)
    return _checkpoint(job_id, int(step), int(found["created_at"]), f"{job_id}:step-{step}", found["metrics"])


def finished_object(job_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """What a job that has succeeded kept: its policy."""
    step, at = int(fields.get("step", 0)), int(float(fields["finished_at"]))
    return _checkpoint(job_id, step, at, fields["policy_id"], _metrics(fields))


def _checkpoint(job_id: str, step: int, created_at: int, name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{job_id}:step-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": created_at,
        "fine_tuned_model_checkpoint": name,
        "fine_tuning_job_id": job_id,
        "step_number": step,
        "metrics": {"step": step, "train_loss": metrics.get("loss"), **metrics},
    }


def _message(fields: Mapping[str, str]) -> str:
    if (state := fields.get("state")) is not None:
        return _STATES[state].format(attempt=fields.get("attempt", "?"))
    if (step := fields.get("checkpoint")) is not None:
        return f"The state after step {step} is kept."
    if (reason := fields.get("given_back")) is not None:
        return f"The attempt ended early: {reason[-SHOWN_REASON:]}"
    if (wish := fields.get("asked")) is not None:
        return f"The job was asked to {wish}."
    if fields.get("phase") == "training" and fields.get("step", "0") != "0":
        return f"Step {fields['step']} is done."
    return f"The job is {fields.get('phase')}."


def _hyperparameters(spec: JobSpec) -> dict[str, Any]:
    """In OpenAI's words; how long a job trains is its steps, whatever epochs they make."""
    method = spec.method.spec
    if isinstance(method, InterpolationSpec):
        return {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}
    default = type(method).model_fields["learning_rate"].default
    times = round(method.learning_rate / default, 6)
    return {"batch_size": method.prompts_per_step, "learning_rate_multiplier": times, "n_epochs": "auto"}


def _gpu_seconds(fields: Mapping[str, str]) -> float:
    """A worker of an older version counts time alone: then it is one GPU's."""
    return max(int(fields.get("gpu_ms", 0)), int(fields.get("spent_ms", 0))) / 1000


def _stopping(fields: Mapping[str, str]) -> str | None:
    """What a running job was asked for and has not come to yet."""
    return "cancel" if fields.get("cancel") == "1" else "pause" if fields.get("pause") == "1" else None


def _error_object(fields: Mapping[str, str]) -> dict[str, str | None] | None:
    if not fields.get("error_code"):
        return None
    return {"code": fields["error_code"], "message": fields.get("error_message", ""), "param": None}


def _metrics(fields: Mapping[str, str]) -> dict[str, float | None]:
    return cast("dict[str, float | None]", _read(fields.get("metrics") or "{}"))


def _read(text: str) -> dict[str, Any]:
    """A metric that is not a number is null: JSON has no NaN."""
    return cast("dict[str, Any]", json.loads(text, parse_constant=lambda _: None))


def _number(fields: Mapping[str, str], name: str) -> float | None:
    return float(fields[name]) if fields.get(name) else None


def _whole(fields: Mapping[str, str], name: str) -> int | None:
    return int(float(fields[name])) if fields.get(name) else None
