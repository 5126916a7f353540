"""The lines of reliability.md 8.7 that a request to `/ledger` can have: what is asked, the status, the field at fault.

Owns: the rows. Does not own: sending them (test_ledger_pages.py). L8, L9, L17, L20 to L23 and L28 need a state of their
own and have tests there, in test_erasing.py and in test_retention.py. Where the other lines are is said in
test_bad_lines.py.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Asked(NamedTuple):
    name: str
    query: str
    param: str


class Erase(NamedTuple):
    name: str
    body: str
    param: str


QUERIES: Final = (
    Asked("L2 backwards", "since=2&until=1", "since"),
    Asked("L2 no number", "since=yesterday", "since"),
    Asked("L2 1e400", "until=1e400", "until"),
    Asked("L2 NaN", "until=NaN", "until"),
    Asked("L3 none", "limit=0", "limit"),
    Asked("L3 a billion", "limit=1000000000", "limit"),
    Asked("L3 beyond the cap", "limit=1001", "limit"),
    Asked("L3 no whole number", "limit=1.0", "limit"),
    Asked("L4 forged", "cursor=MS0w.00000000000000000000000000000000", "cursor"),
    Asked("L4 cut", "cursor=MS0w", "cursor"),
    Asked("L4 empty", "cursor=", "cursor"),
    Asked("L5 a stream's id", "cursor=9999999999999-0", "cursor"),
    Asked("L5 a negative one", "cursor=-1-1", "cursor"),
    Asked("L5 letters", "cursor=abc", "cursor"),
    Asked("L6 an unknown field", "fields=id,price", "fields"),
    Asked("L6 no field", "fields=", "fields"),
    Asked("L7 SQL", "route=1%20OR%201%3D1", "route"),
    Asked("L7 an operator", "policy=%7B%22%24where%22%3A1%7D", "policy"),
    Asked("L7 an unknown filter", "%24where=1", "(unprintable name)"),
    Asked("L7 no flag", "has_feedback=1", "has_feedback"),
    Asked("L7 no reward", "min_reward=high", "min_reward"),
    Asked("L7 a name of 513", "user=" + "a" * 513, "user"),
    Asked("L10 embeddings", "include=embeddings", "include"),
    Asked("twice", "limit=1&limit=2", "limit"),
)
ERASURES: Final = (
    Erase("L18 nobody", "{}", "user"),
    Erase("L18 nothing", '{"user": ""}', "user"),
    Erase("L18 null", '{"user": null}', "user"),
    Erase("L18 blanks", '{"user": "  "}', "user"),
    Erase("L19 everybody", '{"user": "*"}', "user"),
    Erase("L19 everybody in SQL", '{"user": "%"}', "user"),
    Erase("L26 10 KiB", '{"user": "' + "a" * 10_240 + '"}', "user"),
    Erase("several", '{"user": ["a", "b"]}', "user"),
    Erase("C62 another tenant's", '{"user": "a", "tenant": "acme"}', "tenant"),
)
