"""A benchmark's exit status and JSON file are what its claims say."""

import io
import json
import math

import pytest
from rich.console import Console

from benchmarks import claims


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (claims.at_least("share", 0.9, 0.9), True),
        (claims.at_least("share", 0.8999, 0.9), False),
        (claims.at_most("nats", 3.67, 3.67), True),
        (claims.at_most("nats", 3.6701, 3.67), False),
        (claims.above("gain", 0.0, 0.0), False),
        (claims.above("gain", 1e-9, 0.0), True),
        (claims.at_least("share", math.nan, 0.9), False),
        (claims.at_most("nats", math.nan, 3.67), False),
    ],
)
def test_a_claim_holds_at_its_bound_and_not_beyond(claim, holds):
    assert claim.holds is holds


def test_one_broken_claim_breaks_the_benchmark():
    good, bad = claims.at_least("good", 2, 1), claims.at_least("bad", 0, 1)
    assert claims.finish([good], None, {}, quiet()) == 0
    assert claims.finish([good, bad], None, {}, quiet()) == 1


def test_a_benchmark_must_claim_something():
    with pytest.raises(ValueError, match="at least one claim"):
        claims.finish([], None, {}, quiet())


def test_the_json_file_holds_the_claims(tmp_path):
    path = tmp_path / "new" / "circle.json"
    claims.finish([claims.at_least("share", math.nan, 0.9)], path, {"seeds": 3}, quiet())
    report = json.loads(path.read_text())
    assert report["claims"] == [{"name": "share", "value": None, "target": "≥ 0.9", "holds": False}]
    assert report["figures"] == {"seeds": 3}
    assert report["machine"]["processor"]


def test_markdown_is_a_table():
    assert claims.markdown(("arm", "reward"), [("one", "1.0")]) == "| arm | reward |\n| --- | ---: |\n| one | 1.0 |\n"
