"""`bonsai circle`: routes that distil themselves again and again, and the switch that stops them.

Owns: what a user can say and the lines that come back. Does not own: the API's client (client.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from bonsai.gateway_address import GatewayAddress, asks_gateway

if TYPE_CHECKING:
    from bon_algos.contracts import Interval, Turn
    from bonsai.client import BonsaiClient, RunningCircle


@click.group()
@asks_gateway
@click.pass_context
def circle(context: click.Context, url: str, directory: Path) -> None:
    """Routes that turn by themselves: collect, distil, prove, shadow, canary, live."""
    context.obj = GatewayAddress(url, directory)


@circle.command("set")
@click.argument("route")
@click.argument("spec", type=click.File("r"))
@click.pass_obj
def put(gateway: GatewayAddress, route: str, spec: IO[str]) -> None:
    """Begin ROUTE's circle, or change its rules: the JSON in SPEC, the body of PUT /routes/ROUTE/circle; - reads it
    from standard input."""
    from pydantic import ValidationError

    from bon_algos.contracts import CircleSpec

    try:
        asked = CircleSpec.model_validate_json(spec.read())
    except ValidationError as error:
        raise click.BadParameter(str(error), param_hint="SPEC") from None

    async def work(client: BonsaiClient) -> None:
        _say(await client.put_circle(route, asked))

    gateway.run(work)


@circle.command()
@click.argument("route")
@click.pass_obj
def show(gateway: GatewayAddress, route: str) -> None:
    """What ROUTE's circle does and has done, a line for each turn."""

    async def work(client: BonsaiClient) -> None:
        found = await client.circle(route)
        _say(found)
        for turn in (*found.turns, *(() if found.turn is None else (found.turn,))):
            _say_turn(turn)

    gateway.run(work)


@circle.command()
@click.argument("route")
@click.pass_obj
def start(gateway: GatewayAddress, route: str) -> None:
    """Let ROUTE's circle go on after a stop, from the policy that is live now."""

    async def work(client: BonsaiClient) -> None:
        _say(await client.ask_circle("start", route))

    gateway.run(work)


@circle.command()
@click.argument("route", required=False)
@click.pass_obj
def stop(gateway: GatewayAddress, route: str | None) -> None:
    """Stop ROUTE's circle, or all of them: jobs and trials under way end, what is live stays."""

    async def work(client: BonsaiClient) -> None:
        stopped = await client.stop_circles() if route is None else [await client.ask_circle("stop", route)]
        for one in stopped:
            _say(one)

    gateway.run(work)


def _say(one: RunningCircle) -> None:
    phase = "collecting" if one.turn is None else f"turn {one.turn.number}: {one.turn.phase}"
    spent = f"{one.spent.jobs} jobs and {one.spent.gpu_seconds:.0f} GPU-seconds in 24 h, {one.spent.kl_base:.2f} nats"
    click.echo("  ".join(part for part in (one.route, one.status, phase, one.live_policy or "base", spent) if part))
    if one.reason:
        click.echo(f"  {one.reason}")


def _say_turn(turn: Turn) -> None:
    told = (
        f"  turn {turn.number}",
        f"{turn.outcome or turn.phase:<9}",
        turn.policy or turn.job_id or "",
        f"reward {_text(turn.reward_gain)}",
        f"second {_text(turn.judge_gain)}",
        "" if turn.kl_base is None else f"{turn.kl_base:.2f} nats",
        f"{turn.seconds:.0f} s",
        turn.reason,
    )
    click.echo("  ".join(part for part in told if part))


def _text(gain: Interval | None) -> str:
    return "–" if gain is None else f"{gain.mean:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]"
