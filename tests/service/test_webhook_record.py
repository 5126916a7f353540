"""What a change makes of a webhook's record: what was said, and when anything was changed at all."""

from __future__ import annotations

import pytest

from service.webhook_record import OwnWebhookMembers, WebhookChange, WebhookRecord

MADE, NOW = 1000, 2000.5
RECORD = WebhookRecord(
    id="wh_1",
    tenant="default",
    name="n",
    url="https://a.example/",
    event_types=("fine_tuning.job.failed",),
    created_at=MADE,
    updated_at=MADE,
    created_by="key_1",
)
DISABLED = RECORD.disabled("by_request", MADE)


def wish(*, enabled: bool) -> WebhookChange:
    return WebhookChange(bonsai=OwnWebhookMembers(enabled=enabled))


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        (RECORD, WebhookChange()),
        (RECORD, WebhookChange(name="n", url="https://a.example/", event_types=("fine_tuning.job.failed",) * 2)),
        (RECORD, wish(enabled=True)),
        (DISABLED, wish(enabled=False)),
    ],
)
def test_what_says_what_is_so_already_is_no_change(record, asked):
    assert record.amended(asked, NOW) == record


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        (RECORD, WebhookChange(name="another")),
        (RECORD, WebhookChange(event_types=("bonsai.policy.live",))),
        (RECORD, wish(enabled=False)),
        (DISABLED, wish(enabled=True)),
        # Nobody asked for that: from now on somebody does.
        (RECORD.disabled("failing", MADE), wish(enabled=False)),
    ],
)
def test_a_change_says_when_it_was_made(record, asked):
    amended = record.amended(asked, NOW)
    assert (amended.updated_at, amended.created_at) == (2000, MADE)
    assert amended.disabled_reason in (None, "by_request")


def test_a_rotation_is_a_change_and_becoming_disabled_unasked_is_none():
    assert RECORD.rotated(NOW, keeps_former=False).updated_at == 2000
    assert RECORD.disabled("gone", NOW).updated_at == MADE
