"""`bonsai circle` against a real gateway: begun, shown, stopped, started; and what is refused is said."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from bonsai.cli import main
from tests.fixtures.gateway import World, engine, reward, world

__all__ = ["engine", "reward", "world"]
Ask = Callable[..., Result]


@pytest.fixture
def ask(world: World, monkeypatch: pytest.MonkeyPatch) -> Ask:
    host, port = world.client.address
    monkeypatch.setenv("BONSAI_API_KEY", str(world.client.key))
    return lambda *said, **more: CliRunner().invoke(main, ["circle", "--url", f"http://{host}:{port}", *said], **more)


def test_a_circle_is_begun_shown_stopped_and_started(ask: Ask):
    begun = ask("set", "default", "-", input=json.dumps({"n": 4, "min_groups": 10}))
    assert begun.output.split()[:4] == ["default", "running", "collecting", "base"]
    assert ask("show", "default").output.split()[1] == "running"
    assert ask("stop").output.split()[:2] == ["default", "stopped"]
    assert "stopped by" in ask("show", "default").output
    assert ask("start", "default").output.split()[1] == "running"
    assert ask("stop", "default").output.split()[1] == "stopped"


@pytest.mark.parametrize(
    ("said", "body", "why"),
    [
        (("set", "default", "-"), '{"n": 1}', "greater than or equal to 2"),
        (("set", "nowhere", "-"), "{}", "no such route"),
        (("show", "default"), None, "the route has no circle"),
        (("start", "default"), None, "the route has no circle"),
    ],
)
def test_what_is_refused_is_said(ask: Ask, said: tuple[str, ...], body: str | None, why: str):
    refused = ask(*said, input=body)
    assert refused.exit_code != 0
    assert why in refused.output
