"""No line of reliability.md 8.3, 8.4 and 8.7 is forgotten: each has a row that is sent, a test of its own, or a reason.

Owns: which line is where. Does not own: the rows (bad_admin_input.py, bad_training_data.py, bad_input.py,
bad_ledger_input.py) nor sending them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.service.bad_admin_input import BAD
from tests.service.bad_ledger_input import ERASURES, QUERIES
from tests.service.bad_registry_input import REGISTRY
from tests.service.bad_training_data import FAULTY, NO_FORMAT, NO_JOB, SERVED
from tests.service.test_registry_routes import BAD_FILES

SECTIONS: Final = {"D": 49, "P": 40, "L": 38}
"""The letter of a section's lines, and the last of them."""

TESTS: Final[Mapping[str, Mapping[str, str]]] = {
    "test_tenants.py": {
        "D15": "test_a_ledger_teaches_its_own_tenant_alone",
        "P27": "test_C13_another_tenants_object_is_absent",
        "L8": "test_lists_hold_what_is_ones_own",
    },
    "../worker/test_judge.py": {
        "D21": "test_what_chose_and_trained_is_no_second_opinion",
    },
    "../bon_algos/test_acceptance.py": {
        "D22": "test_prompts_linked_through_a_third_stay_together",
    },
    "test_jobs.py": {
        "D35": "test_the_same_key_and_body_are_one_job",
        "D36": "test_D36_a_tenant_has_so_many_open_jobs_and_no_more",
        "D39": "test_a_finished_job_cannot_be_cancelled",
        "D40": "test_a_running_job_is_asked_to_stop_and_asked_again_is_no_error",
    },
    "test_dry_run.py": {
        "D3": "test_why_a_job_would_fail_is_told_and_is_no_error",
    },
    "test_job_stream.py": {
        "D41": "test_a_stream_from_nowhere_is_refused",
        "D42": "test_a_key_has_so_many_streams_and_one_that_leaves_makes_room",
    },
    "test_trials.py": {
        "P7": "test_P7_P21_what_may_not_be_tried_says_why",
    },
    "test_deletion.py": {
        "P9": "test_P9_what_an_experiment_a_job_or_a_tag_needs_or_somebody_protects_stays",
        "P16": "test_P16_a_job_that_makes_a_deleted_policy_again_fails_and_says_so",
    },
    "test_policies.py": {
        "P30": "test_P30_a_policy_is_retired_once",
        "P22": "test_a_failed_fingerprint_fails_the_policy_and_bumps_its_version",
        "P23": "test_promoting_needs_a_reason_a_policy_and_a_route",
    },
    "test_publishing_faults.py": {
        "P31": "test_an_adapter_with_requests_under_way_leaves_when_they_have_ended_or_have_had_their_time",
        "P35": "test_slots_that_run_short_go_from_the_least_recently_used_that_nothing_points_at",
    },
    "test_admin_routes.py": {
        "P33": "test_without_redis_the_gateway_serves_and_refuses_changes",
    },
    "test_publishing_replicas.py": {
        "P34": "test_served_is_what_engines_in_rotation_proved",
    },
    "test_ledger_pages.py": {
        "L1": "test_pages_go_on_from_the_stream_into_the_archive",
        "L9": "test_L9_without_the_right_to_content_texts_are_withheld",
        "L21": "test_L21_asked_twice_it_is_the_same_receipt_about_all_until_then",
        "L25": "test_L25_an_unknown_receipt_is_404",
    },
    "../bonsai/test_ledger_command.py": {
        "L11": "test_L11_no_other_format",
    },
    "../bonsai/test_replay_command.py": {
        "L15": "test_a_reward_model_that_is_none_or_away_is_said_in_words",
        "L16": "test_a_ledger_of_many_pages_is_read_newest_first_and_no_further_than_asked",
        "L17": "test_what_cannot_be_replayed_is_counted_by_reason",
    },
    "../worker/test_erasing.py": {
        "L20": "test_L20_another_tenants_user_of_that_name_is_another",
        "L22": "test_L22_killed_in_the_middle_it_is_done_by_the_next",
    },
    "../worker/test_erased_windows.py": {
        "L23": "test_L23_a_job_that_reads_the_window_fails_and_what_was_learned_is_tainted",
    },
    "../archive/test_retention.py": {
        "L28": "test_L28_times_that_make_no_sense_are_refused",
    },
    "../worker/test_frozen_writer.py": {
        "L30": "test_frozen_anywhere_and_overtaken",
    },
}
"""By file the line, and the test that has it: it needs a state, a clock, another tenant, or is no request."""
ELSEWHERE: Final = [(file, line, test) for file, tests in TESTS.items() for line, test in tests.items()]

WAIVED: Final[Mapping[str, str]] = {
    "D45": "only the whole window tells, and reading it takes up to 20 s: a dry run says so, and the job fails with it",
    "P15": "no adapter's bytes come over HTTP: an import is registered by its digest from the operator's own disk",
    "P28": "a policy is downloaded as it is read: Range is ignored, as RFC 9110 14.2 lets a server",
    "P36": "there are no approvals: who promotes by hand gives a reason, which the audit keeps",
    "P37": "there are no approvals",
    "P40": "policies come from jobs, which are limited (D36), and from an operator's imports; tags have their quota",
    "L12": "an export is a command of the operator, on the operator's machine and into the operator's files",
    "L13": "an export goes to a file, and to no URL",
    "L14": "an export is a process of the operator's own: as many as they start",
    "L24": "backups are the operator's to expire (docs/ledger.md): nothing here reaches into them",
    "L27": "there are no legal holds: nothing is kept from an erasure",
    "L29": "no request changes retention: it is the compactor's setting",
}
"""The line, and why it does not fit this house."""


def names_of_rows() -> Iterator[str]:
    for rows in (BAD, REGISTRY, QUERIES, ERASURES):
        yield from (row.name for row in rows)
    for table in (NO_JOB, NO_FORMAT, FAULTY, SERVED, BAD_FILES):
        yield from table


def lines_in(name: str) -> set[str]:
    """Ids in front of a name, "D2 D3 n 1": what follows is free text."""
    leading = re.match(r"(?:[DPL]\d+ )*", name)
    return set() if leading is None else set(leading[0].split())


def test_every_line_of_the_three_sections_is_here():
    listed = {f"{letter}{i}" for letter, last in SECTIONS.items() for i in range(1, last + 1)}
    rows = set().union(*map(lines_in, names_of_rows()))
    tested = rows | {line for _, line, _ in ELSEWHERE}
    assert tested | WAIVED.keys() == listed
    assert not WAIVED.keys() & tested


@pytest.mark.parametrize(("file", "line", "test"), ELSEWHERE, ids=[line for _, line, _ in ELSEWHERE])
def test_a_line_that_is_tested_elsewhere_is(file: str, line: str, test: str):
    functions = ast.parse((Path(__file__).parent / file).read_text()).body
    assert test in {one.name for one in functions if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
