"""`bonsai webhooks` against a real gateway: what is asked for happens, and what is refused is said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bonsai.cli import main
from service.store import open_redis
from tests.fixtures.gateway import engine, gateway_settings, reward, running_gateway
from tests.fixtures.waiting import wait_until
from tests.service.receiver import Receiver
from tests.service.test_webhook_delivery import cancelled_job
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


async def end_a_job(redis_url: str) -> None:
    async with open_redis(redis_url) as redis:
        await cancelled_job(redis)


def test_one_is_added_tried_looked_after_and_removed(ask: Ask, receiver: Receiver, redis_url: str):
    receiver.script = [418, 503]
    added = ask("add", receiver.url, "--event", "fine_tuning.job.cancelled", "--name", "pager").output
    webhook_id, secret = added.split()[0], added.splitlines()[1].split()
    assert secret[0] == "secret"
    assert secret[1].startswith("whsec_")
    assert ask("list").output == f"{webhook_id}  pager  enabled  {receiver.url}  fine_tuning.job.cancelled\n"
    tried = ask("test", webhook_id, "--event", "bonsai.policy.live").output
    assert tried == "bonsai.policy.live was answered with 418\n"
    asyncio.run(end_a_job(redis_url))
    wait_until(lambda: ask("deliveries", webhook_id).output != "")
    [line] = ask("deliveries", webhook_id).output.splitlines()
    assert "retrying   503  evt_" in line
    assert "  fine_tuning.job.cancelled  #1  it did not accept  again at 2" in line
    assert "1 waiting" in ask("list").output
    assert ask("remove", webhook_id).output == f"removed {webhook_id}\n"
    assert ask("list").output == ""


@pytest.mark.parametrize(("said", "signatures"), [((), 1), (("--keep-former",), 2)])
def test_another_secret_is_printed_and_the_former_one_ends_unless_it_is_kept(ask: Ask, receiver, said, signatures):
    added = ask("add", receiver.url).output
    rotated = ask("rotate", *said, added.split()[0]).output.split()
    assert rotated[0] == "secret"
    assert rotated[1].startswith("whsec_")
    assert rotated[1] not in added
    ask("test", added.split()[0])
    assert len(receiver.received[0].headers["webhook-signature"].split()) == signatures


def test_left_to_itself_it_is_told_of_the_ends_of_jobs(ask: Ask, receiver: Receiver):
    shown = ask("add", receiver.url).output
    assert "fine_tuning.job.succeeded,fine_tuning.job.failed,fine_tuning.job.cancelled" in shown


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (("remove", "wh_none"), "no such webhook (404 webhook_not_found)"),
        (("test", "../keys"), "(404 "),
        (("rotate", "wh_none"), "no such webhook (404 webhook_not_found)"),
        (("add", "gopher://example.com"), "url must begin with https:// or http:// (422 invalid_field)"),
        (("add", "https://example.com", "--event", "everything"), "event_types[0]"),
    ],
)
def test_a_refusal_is_said_with_status_1(ask: Ask, said: tuple[str, ...], reason: str):
    result = ask(*said)
    assert result.exit_code == 1
    assert reason in result.output
