"""Rows of the OpenAPI document's facts: jobs, and the files that they learn from.

Owns them alone; otherwise as operations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bon_algos.contracts import JobSpec
from service import job_replies, replies, training_replies
from service.errors import (
    Conflict,
    FileNotFound,
    InvalidField,
    JobNotFound,
    Overloaded,
    PolicyNotFound,
    QueueFull,
    RateLimited,
    RouteNotFound,
    StoreFull,
)
from service.file_form import FileForm
from service.fine_tuning_body import FineTuningRequest
from service.headers import LAST_EVENT_ID, REPLAYED
from service.operation import AFTER, ONCE, PAGE, Body, Operation, header, query

DRY_RUN: Final = query("dry_run", "Nothing is submitted: the reply is of the data.", type="boolean", default=False)

JOB_OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("GET", ""): Operation("All jobs", {200: replies.listed(job_replies.JOB)}, parameters=PAGE, errors=(InvalidField,)),
    ("GET", "/{job_id}"): Operation("A job", {200: job_replies.JOB}, errors=(JobNotFound, InvalidField)),
    ("GET", "/{job_id}/events"): Operation(
        "What a job went through, or goes through, oldest first",
        {200: replies.listed(job_replies.EVENT), 204: None},
        parameters=(
            *PAGE,
            query("stream", "As with `Accept: text/event-stream`.", type="string", enum=["true", "false"]),
            header(LAST_EVENT_ID, "Of a stream: the id behind which it goes on.", pattern="^[0-9]+-[0-9]+$"),
        ),
        errors=(JobNotFound, InvalidField, RateLimited, Overloaded),
        streams=True,
    ),
    ("GET", "/{job_id}/checkpoints"): Operation(
        "The states of its training that are kept",
        {200: replies.listed(job_replies.CHECKPOINT)},
        parameters=PAGE,
        errors=(JobNotFound, InvalidField),
    ),
    **{
        ("POST", f"/{{job_id}}/{wish}"): Operation(
            f"{wish.capitalize()} a job",
            {200: job_replies.JOB},
            parameters=(ONCE,),
            errors=(JobNotFound, Conflict, StoreFull, InvalidField, *more),
        )
        for wish, more in (("pause", ()), ("resume", (QueueFull,)), ("cancel", ()))
    },
}
"""Under each of the two names that jobs have."""

TRAINING_OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("POST", "/distill"): Operation(
        "Submit a distillation, or be told what it would learn from",
        {202: job_replies.JOB, 200: training_replies.DRY_RUN},
        Body(
            JobSpec,
            {"n": 16, "method": {"type": "bond", "bond": {"n": 16, "steps": 200}}},
        ),
        (DRY_RUN, ONCE),
        (RouteNotFound, PolicyNotFound, FileNotFound, QueueFull, Overloaded, StoreFull),
        headers=("Location", REPLAYED),
    ),
    ("POST", "/v1/fine_tuning/jobs"): Operation(
        "Submit a distillation as OpenAI's clients do, or be told what it would learn from",
        {200: {"anyOf": [job_replies.JOB, training_replies.DRY_RUN]}},
        Body(
            FineTuningRequest,
            {"model": "default", "training_file": "ledger:default", "method": {"type": "bond", "bond": {"steps": 200}}},
            nulls="left out at the top",
        ),
        (DRY_RUN, ONCE),
        (RouteNotFound, PolicyNotFound, FileNotFound, QueueFull, Overloaded, StoreFull),
        headers=("Location", REPLAYED),
    ),
    **{
        (method, f"{prefix}{path}"): operation
        for prefix in ("/distill", "/v1/fine_tuning/jobs")
        for (method, path), operation in JOB_OPERATIONS.items()
    },
    ("POST", "/v1/files"): Operation(
        "Upload what jobs can learn from",
        {200: training_replies.FILE},
        Body(
            FileForm,
            {"purpose": "fine-tune", "file": '{"prompt": "1+1=", "completions": ["2", "3"], "rewards": [1.0, 0.0]}'},
            media_type="multipart/form-data",
        ),
        errors=(Conflict, StoreFull),
    ),
    ("GET", "/v1/files"): Operation(
        "All files",
        {200: replies.listed(training_replies.FILE)},
        parameters=(
            query("purpose", "Only files for this; there is one.", type="string"),
            query("limit", "Rows.", type="integer", minimum=1, maximum=10_000, default=1000),
            AFTER,
            query("order", "By the time of their upload.", enum=["asc", "desc"], default="desc"),
        ),
        errors=(InvalidField,),
    ),
    ("GET", "/v1/files/{file_id}"): Operation("A file", {200: training_replies.FILE}, errors=(FileNotFound,)),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        "What is in a file",
        {200: training_replies.CONTENT},
        errors=(FileNotFound,),
        media_type="application/octet-stream",
    ),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        "Delete a file", {200: training_replies.DELETED_FILE}, errors=(FileNotFound, Conflict, StoreFull)
    ),
}
