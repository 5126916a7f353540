"""The demo: the whole circle on this machine, told in parts.

Owns the order of the parts, the time planned for each, and whether the circle closed. Does not own the parts
themselves (`parts.py`), the processes (`up`) or the exit status (`cli`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bonsai.client import BonsaiClient, BonsaiError, open_client
from bonsai.demo import charts, parts, progress, screen
from bonsai.demo.job import CircleBroken, N
from bonsai.demo.measure import Measured
from bonsai.demo.prompts import training_prompts
from bonsai.stack_plan import Plan
from bonsai.status_lines import key_header, shown_path, status_lines
from bonsai.up import Stack, running_stack


@dataclass(frozen=True)
class Told:
    """How the story ended."""

    job_id: str
    policy_id: str
    measured: Measured

    @property
    def is_success(self) -> bool:
        """Whether one sample of the published policy beats one sample of the reference."""
        return self.measured.comparison.reward_gain.low > 0


async def run_demo(plan: Plan, console: Console, *, stop_at_end: bool = False, picture: Path | None = None) -> bool:
    """Tell the story; True only if the distilled policy was published and beats one sample of the reference.

    Unless `stop_at_end`, the server stays up until the task is cancelled; before the end of the story that counts as
    False. The state is a new directory inside the plan's: what an earlier demo promoted must not answer this
    one's prompts. The picture is drawn there unless `picture` names another place.
    Raises what `running_stack` raises.
    """
    progress.fit(console)
    directory = plan.options.directory.absolute() / time.strftime("demo-%Y%m%d-%H%M%S")
    plan = replace(plan, options=replace(plan.options, directory=directory))
    try:
        return await _run(plan, console, stop_at_end, picture or directory / "circle.png")
    except (BonsaiError, CircleBroken) as failure:
        console.print(f"\n[bold red]The demo failed:[/] {escape(str(failure))}", soft_wrap=True)
        console.print(f"The logs: {shown_path(directory / 'logs')}", soft_wrap=True)
    except asyncio.CancelledError:
        console.print("\nstopped before the end of the story")
    return False


async def _run(plan: Plan, console: Console, stop_at_end: bool, picture: Path) -> bool:
    told = progress.Parts(console)
    async with AsyncExitStack() as running:
        with told.part("Starting Redis, two engines, the gateway and a worker", budget=60):
            with status_lines(console) as watch:
                stack = await running.enter_async_context(running_stack(plan, watch))
            client = await running.enter_async_context(open_client(stack.url, api_key=stack.api_key))
        end = await _unless_it_fails(stack, tell(client, console, told, picture))
        told.show()
        _say_verdict(console, end)
        if not stop_at_end:
            await _stay(stack, console, end)
        return end.is_success


async def tell(client: BonsaiClient, console: Console, told: progress.Parts, picture: Path) -> Told:
    """Everything between a ready gateway and the lines to try. Raises BonsaiError or CircleBroken."""
    with told.part(f"One sample beside the best of {N}", budget=10):
        await parts.show_best_of_n(client, console)
    with told.part("Traffic fills the ledger", budget=95):
        curve = await parts.burst(client, console)
    with told.part(f"Distilling: one sample that answers like the best of {N}", budget=240):
        job = await parts.distil(client, console)
    with told.part("Publishing: the engine proves that it serves the new policy", budget=10):
        policy_id = await parts.published(client, console, job)
    with told.part("An experiment: half of the units each", budget=20):
        await parts.experiment(client, console, policy_id)
    with told.part("Measuring, on prompts that nobody has sent before", budget=110):
        measured = await parts.measure_arms(client, console, policy_id, job, curve)
        screen.show_measured(console, measured)
        charts.save(measured, picture)
        picture.with_suffix(".json").write_text(measured.model_dump_json(indent=2) + "\n")
        console.print(f"  The same as a picture: {shown_path(picture)}", soft_wrap=True)
    with told.part("Promoting: the distilled policy answers the route", budget=5):
        await parts.promote(client, console, policy_id)
    return Told(job.id, policy_id, measured)


async def _unless_it_fails(stack: Stack, story: Coroutine[Any, Any, Told]) -> Told:
    """The end of the story; ProcessFailed as soon as the stack cannot be kept."""
    telling, failing = asyncio.create_task(story), asyncio.create_task(stack.failure())
    try:
        await asyncio.wait((telling, failing), return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            raise failing.result()
        return telling.result()
    finally:
        telling.cancel()
        failing.cancel()
        await asyncio.gather(telling, failing, return_exceptions=True)


def _say_verdict(console: Console, end: Told) -> None:
    gain = end.measured.comparison.reward_gain
    bound = f"lower 95 % bound of the gain {gain.low:+.2f}, over {end.measured.prompts} held-out prompts"
    if end.is_success:
        console.print(f"\n[bold green]The circle is closed[/]: the policy was published and beats one sample; {bound}.")
    else:
        console.print(f"\n[bold red]The distilled policy does not beat one sample[/]: {bound}.")


async def _stay(stack: Stack, console: Console, end: Told) -> None:
    """Keep the server up until the user asks for the end. Raises ProcessFailed when it cannot be kept."""
    console.print(f"\nThe server is up at [bold]{stack.url}[/] until Ctrl-C. To try:", soft_wrap=True)
    key = key_header(stack.state.admin_key)
    screen.show_curl_lines(console, stack.url, key, training_prompts()[0], end.policy_id, end.job_id, N)
    try:
        raise await stack.failure()
    except asyncio.CancelledError:
        # The user has seen the whole story and wants the prompt back: not a failure of the demo.
        console.print("stopping")
