"""`bonsai webhooks`: who is told of what happens, from the command line. Everything else is imported when it runs.

Owns: what a user can say and the lines that come back. Does not own: the API's client (client.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from bonsai.gateway_address import GatewayAddress, asks_gateway

if TYPE_CHECKING:
    from bonsai.client import BonsaiClient
    from bonsai.webhook_replies import Webhook, WebhookAttempt

ENDS: Final = tuple(f"fine_tuning.job.{end}" for end in ("succeeded", "failed", "cancelled"))


@click.group()
@asks_gateway
@click.pass_context
def webhooks(context: click.Context, url: str, directory: Path) -> None:
    """Webhooks: have an address of yours told when a job ends or a policy moves."""
    context.obj = GatewayAddress(url, directory)


@webhooks.command("list")
@click.pass_obj
def list_webhooks(gateway: GatewayAddress) -> None:
    """All webhooks, a line each."""

    async def work(client: BonsaiClient) -> None:
        for webhook in await client.webhooks():
            _say(webhook)

    gateway.run(work)


@webhooks.command()
@click.argument("target", metavar="URL")
@click.option("--event", "events", multiple=True, default=ENDS, show_default=True, help="Of which it is told; repeat.")
@click.option("--name", default="bonsai", show_default=True, help="For people.")
@click.pass_obj
def add(gateway: GatewayAddress, target: str, events: tuple[str, ...], name: str) -> None:
    """Have URL told. Prints the secret that its deliveries are signed with, this once."""

    async def work(client: BonsaiClient) -> None:
        webhook = await client.add_webhook(target, events, name)
        _say(webhook)
        click.echo(f"secret  {webhook.signing_secret}")

    gateway.run(work)


@webhooks.command()
@click.argument("webhook_id")
@click.option("--keep-former", is_flag=True, help="The former secret signs beside the new one for 24 hours.")
@click.pass_obj
def rotate(gateway: GatewayAddress, webhook_id: str, keep_former: bool) -> None:
    """Make another secret, printed this once. The former one ends at once."""

    async def work(client: BonsaiClient) -> None:
        webhook = await client.rotate_webhook(webhook_id, keeps_former=keep_former)
        click.echo(f"secret  {webhook.signing_secret}")

    gateway.run(work)


@webhooks.command()
@click.argument("webhook_id")
@click.pass_obj
def remove(gateway: GatewayAddress, webhook_id: str) -> None:
    """Delete a webhook and what waits for it."""

    async def work(client: BonsaiClient) -> None:
        await client.remove_webhook(webhook_id)
        click.echo(f"removed {webhook_id}")

    gateway.run(work)


@webhooks.command()
@click.argument("webhook_id")
@click.option("--event", default=ENDS[0], show_default=True, help="Of which a sample is sent.")
@click.pass_obj
def test(gateway: GatewayAddress, webhook_id: str, event: str) -> None:
    """Send a sample of an event at once, and say what the receiver answers."""

    async def work(client: BonsaiClient) -> None:
        tested = await client.test_webhook(webhook_id, event)
        click.echo(f"{tested.event_type} was answered with {tested.status_code}")

    gateway.run(work)


@webhooks.command()
@click.argument("webhook_id")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.pass_obj
def deliveries(gateway: GatewayAddress, webhook_id: str, limit: int) -> None:
    """The newest attempts, a line each."""

    async def work(client: BonsaiClient) -> None:
        for attempt in (await client.webhook_attempts(webhook_id, limit=limit)).data:
            _say_attempt(attempt)

    gateway.run(work)


def _say(webhook: Webhook) -> None:
    own = webhook.bonsai
    state = "enabled" if own.enabled else f"disabled ({own.disabled_reason})"
    waiting = f"{own.waiting} waiting" if own.waiting else ""
    columns = (webhook.id, webhook.name, state, waiting, webhook.url, ",".join(webhook.event_types))
    click.echo("  ".join(column for column in columns if column))


def _say_attempt(attempt: WebhookAttempt) -> None:
    again = "" if attempt.next_attempt_at is None else f"again at {_time(attempt.next_attempt_at)}"
    answer = str(attempt.status_code or "-")
    columns = (_time(attempt.at), f"{attempt.outcome:<9}", answer, attempt.event, attempt.type)
    click.echo("  ".join(column for column in (*columns, f"#{attempt.attempt}", attempt.error or "", again) if column))


def _time(at: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
