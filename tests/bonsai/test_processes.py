"""The life of one supervised process: first failure, restart, give up, kill after the grace.

The programs wait for the signal by which they are ended; no test waits by sleeping.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from bonsai.leftovers import read_row
from bonsai.processes import Hopeless, LogTail, ProcessFailed, ProcessSpec, ProcessStatus, SupervisedProcess, back_off

pytestmark = pytest.mark.slow


async def says_up(log: LogTail) -> str | None:
    return None if "up\n" in log() else "coming up"


def spec(tmp_path: Path, program: str, **changes: Any) -> ProcessSpec:
    settings: dict[str, Any] = {
        "name": "small",
        "argv": (sys.executable, "-S", "-c", program),
        "environment": {},
        "directory": tmp_path,
        "log": tmp_path / "small.log",
        "probe": says_up,
    }
    return ProcessSpec(**(settings | changes))


def run(work: Coroutine[Any, Any, Any], seconds: float = 30) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))


async def _keep_until_ready_then_stop(process: SupervisedProcess) -> float:
    """Seconds from the request to stop to the end."""
    keeping = asyncio.create_task(process.keep())
    await process.ready.wait()
    began = time.monotonic()
    process.stop()
    await keeping
    return time.monotonic() - began


def test_a_first_life_that_ends_early_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    process = SupervisedProcess(spec(tmp_path, "raise ValueError('no such weights')"), lambda: None)
    with pytest.raises(ProcessFailed, match="small: ValueError: no such weights") as failed:
        run(process.keep())
    assert failed.value.log == tmp_path / "small.log"
    assert process.status.state == "failed"


# Programs here wait for the signal by which the test ends them.


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    process = SupervisedProcess(spec(tmp_path, "", argv=("/nowhere/redis-server",)), lambda: None)
    with pytest.raises(ProcessFailed, match="could not be started"):
        run(process.keep())


def test_what_its_probe_finds_hopeless_is_ended_with_the_reason(tmp_path: Path) -> None:
    async def refused(log: LogTail) -> str | None:
        raise Hopeless("the reward model ranks 12 of 12 pairs wrongly")

    program = "print('up', flush=True); import signal; signal.pause()"
    process = SupervisedProcess(spec(tmp_path, program, probe=refused), lambda: None)
    with pytest.raises(ProcessFailed, match="small: the reward model ranks 12 of 12 pairs wrongly"):
        run(process.keep())
    assert (process.status.state, process.guard) == ("failed", None)


def test_what_was_ready_once_is_not_ended_by_its_probe(tmp_path: Path) -> None:
    answers = iter([None])

    async def refused_later(log: LogTail) -> str | None:
        for answer in answers:
            return answer
        raise Hopeless("ranks wrongly")

    async def until_it_starts_again() -> None:
        keeping = asyncio.create_task(process.keep())
        await process.ready.wait()
        while process.status.state == "ready":
            changed.clear()
            await changed.wait()
        assert process.status.detail.startswith("ranks wrongly")
        process.stop()
        await keeping

    changed = asyncio.Event()
    program = "print('up', flush=True); import signal; signal.pause()"
    process = SupervisedProcess(spec(tmp_path, program, probe=refused_later), changed.set)
    run(until_it_starts_again())
    assert process.status.state == "stopped"


def test_statuses_tell_the_story(tmp_path: Path) -> None:
    seen: list[ProcessStatus] = []
    process = SupervisedProcess(
        spec(tmp_path, "print('up', flush=True); import signal; signal.pause()"), lambda: seen.append(process.status)
    )
    run(_keep_until_ready_then_stop(process))
    states = [status.state for status in seen]
    assert [state for state, before in zip(states, ["", *states], strict=False) if state != before] == [
        "starting",
        "ready",
        "stopping",
        "stopped",
    ]


def test_what_dies_after_it_was_ready_is_started_again(tmp_path: Path) -> None:
    """The first life leaves a mark and dies; the second sees it and stays."""
    program = """
import pathlib, signal, time
mark = pathlib.Path("mark")
second = mark.exists()
mark.touch()
print("up", flush=True)
if second:
    signal.pause()
while not pathlib.Path("seen").exists():
    time.sleep(0.01)  # the program's own wait for the test's mark
"""

    async def story() -> None:
        process = SupervisedProcess(spec(tmp_path, program), lambda: None)
        keeping = asyncio.create_task(process.keep())
        await process.ready.wait()
        (tmp_path / "seen").touch()
        while process.status.restarts == 0 or not process.ready.is_set():
            await asyncio.sleep(0.02)
        assert process.status.restarts == 1
        process.stop()
        await keeping

    run(story())


def test_what_ignores_the_request_is_killed_after_the_grace(tmp_path: Path) -> None:
    program = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    process = SupervisedProcess(spec(tmp_path, program, grace_seconds=0.5), lambda: None)
    assert 0.5 <= run(_keep_until_ready_then_stop(process)) < 10


def test_a_cancelled_keeper_leaves_nothing(tmp_path: Path) -> None:
    async def story() -> int:
        program = "import os, signal; print(os.getpid(), 'up', flush=True); signal.pause()"
        process = SupervisedProcess(spec(tmp_path, program), lambda: None)
        keeping = asyncio.create_task(process.keep())
        await process.ready.wait()
        pid = int(process.log_tail().split()[0])
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        return pid

    assert read_row(run(story())) is None


def test_the_environment_is_what_the_spec_says_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os, signal; print(sorted(os.environ)); print('up', flush=True); signal.pause()"
    process = SupervisedProcess(spec(tmp_path, program, environment={"GIVEN": "1"}), lambda: None)
    run(_keep_until_ready_then_stop(process))
    # Python itself adds LC_CTYPE under the C locale.
    assert (tmp_path / "small.log").read_text().startswith(("['GIVEN']", "['GIVEN', 'LC_CTYPE']"))


def test_a_stale_socket_is_removed_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "engine.sock").touch()
    program = "import os, signal; print('stale' if os.path.exists('engine.sock') else 'up', flush=True); signal.pause()"
    process = SupervisedProcess(spec(tmp_path, program, socket=tmp_path / "engine.sock"), lambda: None)
    run(_keep_until_ready_then_stop(process))


def test_back_off_doubles_up_to_ten_seconds() -> None:
    assert [back_off(deaths) for deaths in (1, 2, 3, 4, 5, 6, 7)] == [0.5, 1, 2, 4, 8, 10, 10]
