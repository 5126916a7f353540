"""Where the policy engines are: one or several, never over a network, and a clear word when it is said wrongly."""

from __future__ import annotations

import pytest

from service.__main__ import main
from service.settings import GatewaySettings
from tests.fixtures.gateway import environment_of, gateway_settings

NAME = "BONSAI_POLICY_ENGINE_URLS"


def test_a_json_list_names_the_engines_in_their_order(tmp_path, monkeypatch):
    settings = gateway_settings(tmp_path, "unix:///run/a.sock", "unix:///run/r.sock", "redis://127.0.0.1")
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(NAME, '["unix:///run/b.sock", "http://127.0.0.1:8001/"]')
    assert GatewaySettings().policy_engine_urls == ("unix:///run/b.sock", "http://127.0.0.1:8001")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('["http://10.0.0.7:8001"]', "never over a network"),
        ('["unix:///a.sock", "http://engine.example:80"]', "never over a network"),
        ('["unix:///a.sock", "unix:///a.sock"]', "names an engine twice"),
        ("[]", "must name 1 to 64 engines"),
        ("unix:///a.sock", "must be JSON"),
    ],
)
def test_what_is_no_list_of_private_engines_is_refused_in_one_line(monkeypatch, capsys, value, says):
    monkeypatch.setenv(NAME, value)
    assert main() == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "policy_engine_urls" in line.lower()]
    assert says in line


def test_a_canary_must_have_time_to_answer(tmp_path):
    with pytest.raises(ValueError, match=r"hung_after_seconds\n.*above canary_after_seconds"):
        gateway_settings(
            tmp_path,
            "unix:///a.sock",
            "unix:///r.sock",
            "redis://127.0.0.1",
            canary_after_seconds=30,
            hung_after_seconds=30,
        )


def test_a_file_of_engines_that_cannot_be_read_stops_the_start_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("BONSAI_POLICY_ENGINES_FILE", str(tmp_path / "absent.json"))
    assert main() == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "policy_engines_file" in line.lower()]
    assert "cannot be read" in line
