"""`bonsai distill`: distillation jobs from the command line. Everything else is imported when it runs.

Owns: what a user can say and the lines that come back. Does not own: the API's client (client.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import click

from bonsai.gateway_address import GatewayAddress, asks_gateway

if TYPE_CHECKING:
    from bonsai.client import BonsaiClient
    from bonsai.job_replies import Job


@click.group()
@asks_gateway
@click.pass_context
def distill(context: click.Context, url: str, directory: Path) -> None:
    """Distillation jobs: learn to need only one sample."""
    context.obj = GatewayAddress(url, directory)


@distill.command()
@click.argument("spec", type=click.File("r"))
@click.pass_obj
def submit(gateway: GatewayAddress, spec: IO[str]) -> None:
    """Submit the job that the JSON in SPEC asks for, the body of POST /distill; - reads it from standard input."""
    from pydantic import ValidationError

    from bon_algos.contracts import JobSpec

    try:
        asked = JobSpec.model_validate_json(spec.read())
    except ValidationError as error:
        raise click.BadParameter(str(error), param_hint="SPEC") from None

    async def work(client: BonsaiClient) -> None:
        _say(await client.distill(asked))

    gateway.run(work)


@distill.command("list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option("--after", metavar="JOB", help="Those that were submitted before this one.")
@click.pass_obj
def list_jobs(gateway: GatewayAddress, limit: int, after: str | None) -> None:
    """The newest jobs, a line each."""

    async def work(client: BonsaiClient) -> None:
        for job in (await client.jobs(limit=limit, after=after)).data:
            _say(job)

    gateway.run(work)


@distill.command()
@click.argument("job_id")
@click.pass_obj
def show(gateway: GatewayAddress, job_id: str) -> None:
    """A job as JSON: progress, metrics, report."""

    async def work(client: BonsaiClient) -> None:
        click.echo((await client.job(job_id)).model_dump_json(indent=1))

    gateway.run(work)


@distill.command()
@click.argument("job_id")
@click.pass_obj
def events(gateway: GatewayAddress, job_id: str) -> None:
    """What a job went through and goes through, until it has ended."""
    from datetime import UTC, datetime

    async def work(client: BonsaiClient) -> None:
        async for event in client.events(job_id):
            at = datetime.fromtimestamp(event.created_at, UTC).strftime("%H:%M:%S")
            click.echo(f"{at}  {event.level:<5}  {event.message}")

    gateway.run(work)


def _wish(wish: Literal["pause", "resume", "cancel"], told: str) -> None:
    @distill.command(wish, help=told)
    @click.argument("job_id")
    @click.pass_obj
    def command(gateway: GatewayAddress, job_id: str) -> None:
        async def work(client: BonsaiClient) -> None:
            _say(await client.ask_job(wish, job_id))

        gateway.run(work)


_wish("pause", "Have a job stop after the step it is at, and keep its state.")
_wish("resume", "Have a paused job go on where it stopped.")
_wish("cancel", "End a job; what it has learned is lost.")


def _say(job: Job) -> None:
    told = job.details
    doing = f"to {told.stopping}" if told.stopping else told.phase if job.status == "running" else ""
    outcome = job.fine_tuned_model or (job.error.code if job.error is not None else "")
    columns = (job.id, f"{job.status:<9}", f"{told.step}/{told.steps}", f"{told.seconds:.0f} s", doing, outcome)
    click.echo("  ".join(column for column in columns if column))
