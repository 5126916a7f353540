"""The command `bonsai`: options, exit statuses and the words a user reads. Everything else is imported when used,
so that `bonsai --help` answers at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bonsai.circle_commands import circle
from bonsai.distill_commands import distill
from bonsai.dry_run import dry_run_command
from bonsai.engines import LORA_RANKS
from bonsai.engines_command import engines_command
from bonsai.ledger.command import ledger_command
from bonsai.registry.command import audit_command, policies_command, rebuild_command
from bonsai.replay.command import replay_command
from bonsai.report_command import report_command
from bonsai.shared_options import in_order, stack_directory
from bonsai.webhook_commands import webhooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from bonsai.processes import ProcessFailed
    from bonsai.stack_plan import Plan
    from bonsai.up import Stack

LOG_LINES_SHOWN = 12

_STACK_OPTIONS = (
    stack_directory("Where everything that lasts is kept."),
    click.option("--policy", default="", metavar="MODEL", help="Directory or hub id; default: the demo's."),
    click.option("--reward", default="", metavar="MODEL", help="Reward model: directory or hub id."),
    click.option(
        "--reward-function",
        default="",
        metavar="MODULE:FUNCTION",
        help="A Python function as the reward model, from this directory or PYTHONPATH.",
    ),
    click.option(
        "--reward-seconds",
        type=click.FloatRange(0.01, 3600),
        default=10.0,
        show_default=True,
        help="That one call of the reward function may take.",
    ),
    click.option(
        "--reward-config",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        default=None,
        help="JSON: reward models that you run yourself, one or an ensemble.",
    ),
    click.option(
        "--reward-pairs",
        envvar="BONSAI_REWARD_PAIRS",
        default="",
        metavar="FILE|none",
        help="JSON list of known pairs that the reward model must rank rightly before it chooses anything; none: it is "
        "not tested. Default: built-in pairs, for a reward model that vLLM serves.",
    ),
    click.option(
        "--judge-function",
        default="",
        metavar="MODULE:FUNCTION",
        help="A second reward model, which scores reports alone: a Python function.",
    ),
    click.option(
        "--judge-config",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        default=None,
        help="JSON: the same, reward models that you run yourself.",
    ),
    click.option(
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Where the gateway listens. Beyond loopback, put a proxy with TLS in front.",
    ),
    click.option(
        "--port",
        type=click.IntRange(0, 65_535),
        default=8000,
        show_default=True,
        help="Of the gateway; 0 takes a free one.",
    ),
    click.option(
        "--redis-url",
        envvar="BONSAI_REDIS_URL",
        default=None,
        metavar="URL",
        help="A Redis of yours, instead of one started here. With a password: set BONSAI_REDIS_URL instead.",
    ),
    click.option(
        "--max-loras",
        type=click.IntRange(1, 64),
        default=4,
        show_default=True,
        help="Policies that the engine holds beside the base.",
    ),
    click.option(
        "--max-lora-rank",
        type=click.Choice(LORA_RANKS),
        default=None,
        help="Largest rank of a policy's adapter; smaller is faster. Default: 8 on CPUs, 32 on a GPU.",
    ),
    click.option(
        "--max-model-len",
        type=click.IntRange(16),
        default=8192,
        show_default=True,
        help="Longest prompt and completion together, tokens; never beyond the model's own.",
    ),
    click.option("--cores", type=click.IntRange(1), default=None, help="Cores to compute with; default: all."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bonsai")
def main() -> None:
    """Best-of-N serving and iterative distillation."""


@main.command()
@in_order(_STACK_OPTIONS)
def up(**options: Any) -> None:
    """Start the stack and keep it: Redis, two engines, the gateway, a worker, the compactor. Ctrl-C takes it all
    down."""
    console = _console()
    plan = _prepare(console, options)
    with _exit_status(console):
        asyncio.run(_until_asked(_keep(plan, console)))


@main.command()
@in_order(_STACK_OPTIONS)
@click.option("--exit", "stop_at_end", is_flag=True, help="Stop everything at the end instead of staying up.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Where the measured table goes as a PNG; default: the demo's state.",
)
def demo(stop_at_end: bool, picture: Path | None, **options: Any) -> None:
    """The whole circle on this machine: serve, log, distil, publish, compare.

    Status 0 only if the distilled policy was published and one sample of it beats one sample of the reference.
    """
    from bonsai.demo.story import run_demo

    console = _console()
    plan = _prepare(console, options)
    with _exit_status(console):
        succeeded = asyncio.run(_until_asked(run_demo(plan, console, stop_at_end=stop_at_end, picture=picture)))
        sys.exit(0 if succeeded else 1)


distill.add_command(dry_run_command)
for command in (
    *(circle, distill, replay_command, engines_command, ledger_command, report_command),
    *(audit_command, policies_command, rebuild_command, webhooks),
):
    main.add_command(command)


@main.group()
def models() -> None:
    """The models that the demo uses."""


@models.command("build-demo")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Default: inside the package, where `bonsai up` looks for them.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def build_demo(directory: Path | None, seed: int) -> None:
    """Train the demo's policy and reward model from nothing (minutes, on a CPU)."""
    from bonsai.demo.build import build_demo_models
    from bonsai.stack_plan import SHIPPED_MODELS

    console = _console()
    target = directory or SHIPPED_MODELS
    report = build_demo_models(target, seed=seed, report=lambda what, share: console.print(f"{share:4.0%}  {what}"))
    console.print(report)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _prepare(console: Console, options: dict[str, Any]) -> Plan:
    from bonsai.function_call import FunctionError
    from bonsai.model_directory import BadModel
    from bonsai.redis_server import NoRedisServer
    from bonsai.stack_plan import Options, prepare

    try:
        plan = prepare(Options(**options))
    except (BadModel, FunctionError, NoRedisServer, OSError) as error:
        _say_failed(console, str(error))
        sys.exit(1)
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/] {warning}", soft_wrap=True)
    return plan


async def _keep(plan: Plan, console: Console) -> None:
    from bonsai.status_lines import status_lines
    from bonsai.up import running_stack

    began = asyncio.get_running_loop().time()
    with status_lines(console) as watch:
        async with running_stack(plan, watch) as stack:
            _say_ready(console, stack, asyncio.get_running_loop().time() - began)
            raise await stack.failure()


async def _until_asked(work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work` until it ends or the user asks for the end: Ctrl-C, SIGTERM, a closed terminal.

    The first request takes the stack down in order; the second does not wait: with this process gone, each guard
    kills what it guards.
    """
    task = asyncio.ensure_future(work)
    requests = 0

    def end() -> None:
        nonlocal requests
        requests += 1
        if requests > 1:
            os._exit(130)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, end)
    return await task


@contextmanager
def _exit_status(console: Console) -> Iterator[None]:
    """0 when the user asked for the end and got it; 1 and the reason for a failure we know."""
    from bonsai.processes import ProcessFailed
    from bonsai.redis_server import UnusableRedis
    from bonsai.runtime_directory import StackRunsAlready, UnsafeDirectory
    from bonsai.up import PortTaken

    try:
        yield
    except asyncio.CancelledError:
        console.print("stopped")
        sys.exit(0)
    except ProcessFailed as failed:
        _say_process_failed(console, failed)
    except (PortTaken, StackRunsAlready, UnsafeDirectory, UnusableRedis, TimeoutError, OSError) as error:
        _say_failed(console, str(error))
    sys.exit(1)


def _say_ready(console: Console, stack: Stack, seconds: float) -> None:
    from bonsai.status_lines import key_header, shown_path

    console.print(f"[bold green]ready[/] at {stack.url} after {seconds:.1f} s · Ctrl-C takes it down", soft_wrap=True)
    key = shown_path(stack.state.admin_key)
    console.print(f"  The administrator's key is in {key}", soft_wrap=True, markup=False)
    headers = f"{key_header(stack.state.admin_key)} -H 'content-type: application/json'"
    line = f"curl '{stack.url}/generate?n=16' {headers} -d '{{\"prompt\": \"…\"}}'"
    console.print(f"  {line}", soft_wrap=True, markup=False)


def _say_process_failed(console: Console, failed: ProcessFailed) -> None:
    from bonsai.status_lines import shown_path

    _say_failed(console, str(failed))
    for line in failed.tail.splitlines()[-LOG_LINES_SHOWN:]:
        console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(f"The whole log: {shown_path(failed.log)}", soft_wrap=True)


def _say_failed(console: Console, reason: str) -> None:
    console.print("failed", style="bold red", end=" ")
    console.print(reason, markup=False, highlight=False, soft_wrap=True)
