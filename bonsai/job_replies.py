"""What a caller of ours reads of replies about jobs.

Owns their members. Does not own asking for them (client.py), nor other replies.
"""

from __future__ import annotations

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from bon_algos.contracts import FINAL_JOB_STATES, DataReport, EvaluationReport, JobState


class Reply(BaseModel):
    """Part of a reply; what else stands there is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class JobError(Reply):
    code: str
    message: str


class JobDetails(Reply):
    """What OpenAI's object has no member for."""

    phase: str | None = None
    stopping: str | None = None
    """What a running job was asked for and has not come to yet."""
    step: int = 0
    steps: int = 0
    metrics: dict[str, float | None] = Field(default_factory=dict)
    seconds: float = 0.0
    """That workers have spent on it, over all attempts."""
    gpu_seconds: float = 0.0
    """The same of each process that trained it."""
    seconds_left: float | None = None
    attempts: int = 0
    report: EvaluationReport | None = None


class Job(Reply):
    id: str
    status: JobState
    created_at: int | None = None
    fine_tuned_model: str | None = None
    """The policy that came out."""
    error: JobError | None = None
    details: JobDetails = Field(default=JobDetails(), validation_alias=AliasChoices("bonsai", "details"))

    @property
    def is_final(self) -> bool:
        return self.status in FINAL_JOB_STATES


class JobPage(Reply):
    data: tuple[Job, ...]
    has_more: bool


class EventData(Reply):
    phase: str | None = None


class JobEvent(Reply):
    id: str
    """`<ms since the epoch>-<number>`."""
    created_at: int
    level: str
    message: str
    data: EventData = EventData()

    @property
    def phase(self) -> str | None:
        """That the job is in, from then on."""
        return self.data.phase


class DryRun(Reply):
    """What a job would learn from."""

    data: DataReport
    expected_seconds: float | None
    expected_from_jobs: int
