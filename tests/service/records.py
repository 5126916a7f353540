"""Records with every field that a test does not care about filled in."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from bon_algos.contracts import (
    Arm,
    ArmReason,
    Candidate,
    CandidateGroup,
    DataWindow,
    EvaluationReport,
    FileRecord,
    FingerprintResult,
    Interval,
    JobSpec,
    Manifest,
    Method,
    PolicyRecord,
    PolicyState,
    Route,
    Sampling,
    adapter_digest,
)

BASE = "pol-" + "0" * 16
STUDENT = "pol-" + "1" * 16
REWARD_MODEL = "rm-" + "2" * 16
FILES = {"adapter_config.json": "a" * 64, "adapter_model.safetensors": "b" * 64, "fingerprint.json": "c" * 64}
PASSED = FingerprintResult(passed=True, tokens=300, mean_abs_difference=1e-5, mean_abs_base_distance=0.5)


def route(live_policy: str | None = None, name: str = "default") -> Route:
    return Route(name=name, base_policy=BASE, reward_model=REWARD_MODEL, live_policy=live_policy)


def job_spec(**changes: object) -> JobSpec:
    return JobSpec.model_validate({"method": Method(type="bon_forward_kl"), **changes})


def report() -> EvaluationReport:
    point = Interval(mean=0, low=0, high=0)
    return EvaluationReport(
        prompts=2, samples_per_prompt=2, reward_policy=point, reward_reference=point, reward_best_of_n=point,
        reward_gain=point, n=16, gain_share=0, win_rate=point, kl_policy_reference=point, mean_tokens_policy=1,
        mean_tokens_reference=1,
    )  # fmt: skip


def manifest(policy_id: str = STUDENT, files: dict[str, str] = FILES, digest: str | None = None) -> Manifest:
    data = DataWindow(
        groups=4, rejected={}, train_groups=2, held_out_groups=2, first_id="1-0", last_id="2-0", digest=""
    )
    return Manifest(
        policy_id=policy_id, digest=digest or adapter_digest(files), base_policy_id=BASE, parent_policy_id=BASE,
        reward_model_id=REWARD_MODEL, job_id="job_1", epoch=1, created_at=0.0, spec=job_spec(), data=data,
        report=report(), files=files, lora_rank=8, steps=1,
    )  # fmt: skip


def policy(
    policy_id: str,
    state: PolicyState = "candidate",
    n_equivalent: int = 16,
    created_at: float = 0.0,
    fingerprint: FingerprintResult | None = PASSED,
    written: Manifest | None = None,
) -> PolicyRecord:
    if policy_id == BASE:
        return PolicyRecord(id=BASE, kind="base", state="live", created_at=0.0)
    return PolicyRecord(
        id=policy_id,
        kind="lora",
        state=state,
        created_at=created_at,
        n_equivalent=n_equivalent,
        manifest=written or manifest(policy_id),
        fingerprint=fingerprint,
    )


def numbered(number: int) -> str:
    """A policy id."""
    return f"pol-{sha256(str(number).encode()).hexdigest()[:16]}"


def group(
    candidates: Sequence[tuple[float | None, int]],
    arm: Arm | None = None,
    experiment: str | None = None,
    arm_reason: ArmReason = "default",
    selected: int | None = 0,
) -> CandidateGroup:
    """candidates: (reward, tokens) in drawing order."""
    drawn = tuple(
        Candidate(text="a", token_ids=(1,) * tokens, logprobs=(-1.0,) * tokens, finish_reason="stop", reward=reward)
        for reward, tokens in candidates
    )
    arm = arm or Arm(policy=BASE, n=len(drawn))
    return CandidateGroup(
        id="resp_1", created_at=0.0, route="default", experiment=experiment, arm=arm, arm_reason=arm_reason,
        policy_id=arm.policy, reward_model_id=REWARD_MODEL, reward_template_digest="", policy_template_digest="",
        settings_digest="", prompt="p", prompt_token_ids=(1,), sampling=Sampling(max_tokens=8), requested=len(drawn),
        candidates=drawn, selected=selected, status="ok",
    )  # fmt: skip


def file_record(**changes: object) -> FileRecord:
    values: dict[str, object] = {
        "id": "file-" + "3" * 32, "filename": "f.jsonl", "bytes": 1, "created_at": 0.0, "digest": "3" * 64,
        "stored_as": "3" * 64 + "-00000000", "format": "jsonl", "status": "processed", "rows": 1, "window": 256,
        "policy_template_digest": "",
    }  # fmt: skip
    return FileRecord.model_validate({**values, **changes})
