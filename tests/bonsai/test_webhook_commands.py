"""`bonsai webhooks` against a real gateway: what is asked for happens, and what is refused is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bonsai.cli import main
from tests.fixtures.gateway import engine, gateway_settings, reward, running_gateway, wait_until
from tests.service.receiver import Receiver
from tests.stubs.engine import StubEngine
from tests.stubs.reward import StubReward
from tests.stubs.server import running

__all__ = ["engine", "reward"]
Ask = Callable[..., Result]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as one:
        yield one


@pytest.fixture
def ask(
    tmp_path: Path, engine: StubEngine, reward: StubReward, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ask]:
    allowed = {"webhook_private_addresses": True, "webhook_plain_http": True}
    with (
        running(engine.app()) as engine_url,
        running(reward.app()) as reward_url,
        running_gateway(gateway_settings(tmp_path, engine_url, reward_url, redis_url, **allowed)) as client,
    ):
        monkeypatch.setenv("BONSAI_API_KEY", str(client.key))
        url = f"http://{client.address[0]}:{client.address[1]}"
        yield lambda *said: CliRunner().invoke(main, ["webhooks", "--url", url, *said])


def test_one_is_added_tried_looked_after_and_removed(ask: Ask, receiver: Receiver):
    receiver.script = [503]
    added = ask("add", receiver.url, "--event", "bonsai.policy.live", "--description", "the pager").output
    webhook_id, secret = added.split()[0], added.splitlines()[1].split()
    assert secret[0] == "secret"
    assert secret[1].startswith("whsec_")
    assert ask("list").output == f"{webhook_id}  enabled  {receiver.url}  bonsai.policy.live\n"
    event = ask("test", webhook_id).output.split()[1]
    wait_until(lambda: ask("deliveries", webhook_id).output != "")
    [line] = ask("deliveries", webhook_id).output.splitlines()
    assert f"retrying   503  {event}  webhook.test  #1  it did not accept  again at 2" in line
    assert "1 waiting" in ask("list").output
    assert ask("remove", webhook_id).output == f"removed {webhook_id}\n"
    assert ask("list").output == ""


def test_left_to_itself_it_is_told_of_the_ends_of_jobs(ask: Ask, receiver: Receiver):
    shown = ask("add", receiver.url).output
    assert "fine_tuning.job.succeeded,fine_tuning.job.failed,fine_tuning.job.cancelled" in shown


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (("remove", "wh_none"), "no such webhook (404 webhook_not_found)"),
        (("test", "../keys"), "(404 "),
        (("add", "gopher://example.com"), "url must begin with https:// or http:// (422 invalid_field)"),
        (("add", "https://example.com", "--event", "everything"), "events[0]"),
    ],
)
def test_a_refusal_is_said_with_status_1(ask: Ask, said: tuple[str, ...], reason: str):
    result = ask(*said)
    assert result.exit_code == 1
    assert reason in result.output
