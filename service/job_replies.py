"""The form of jobs, their events and their checkpoints in replies: OpenAI's objects, ours under `bonsai`.

Owns: their members. Does not own: filling them (job_object.py), the other replies (replies.py).
"""

from __future__ import annotations

from typing import Final

from bon_algos.contracts import EvaluationReport, JobPhase, JobSpec, JobState
from service.replies import NUMBER, TEXT, WHOLE, Named, kind, maybe, members, one_of, rows

METRICS: Final = {"type": "object", "additionalProperties": maybe(NUMBER)}
JOB: Final = Named(
    "Job",
    members(
        id=TEXT,
        object=kind("fine_tuning.job"),
        status=one_of(JobState),
        created_at=WHOLE,
        finished_at=maybe(WHOLE),
        estimated_finish=maybe(WHOLE),
        model=TEXT,
        fine_tuned_model=maybe(TEXT),
        training_file=TEXT,
        validation_file={"type": "null"},
        result_files=rows(TEXT),
        method={"type": "object"},
        hyperparameters={"type": "object"},
        seed=WHOLE,
        metadata={"type": "object", "additionalProperties": TEXT},
        organization_id=TEXT,
        trained_tokens=maybe(WHOLE),
        integrations=rows({"type": "object"}),
        error=maybe(members(code=TEXT, message=TEXT, param=maybe(TEXT))),
        bonsai=members(
            phase=one_of(JobPhase),
            stopping=maybe({"enum": ["pause", "cancel"]}),
            step=WHOLE,
            steps=WHOLE,
            metrics=METRICS,
            seconds=NUMBER,
            gpu_seconds=NUMBER,
            seconds_left=maybe(NUMBER),
            tokens=members(trained=WHOLE, sampled=WHOLE),
            attempts=WHOLE,
            started_at=maybe(NUMBER),
            spec=JobSpec,
            report=maybe(EvaluationReport),
        ),
    ),
)
EVENT: Final = Named(
    "JobEvent",
    members(
        id=TEXT,
        object=kind("fine_tuning.job.event"),
        created_at=WHOLE,
        level={"enum": ["info", "warn", "error"]},
        message=TEXT,
        type={"enum": ["message", "metrics"]},
        data=members(phase=maybe(TEXT), status=maybe(TEXT), step=maybe(WHOLE), metrics=METRICS),
    ),
)
CHECKPOINT: Final = Named(
    "JobCheckpoint",
    members(
        id=TEXT,
        object=kind("fine_tuning.job.checkpoint"),
        created_at=WHOLE,
        fine_tuned_model_checkpoint=TEXT,
        fine_tuning_job_id=TEXT,
        step_number=WHOLE,
        metrics=METRICS,
    ),
)
