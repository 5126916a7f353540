"""A Python function as a reward model: its process really started, hung, killed, changed and asked again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from bonsai.function_call import FunctionError, answer
from bonsai.function_processes import MOST_WAITING, FunctionProcesses, NoRoom
from bonsai.guard import descendants
from bonsai.processes import ProcessSpec
from bonsai.reward_function import RewardFunction, function_environment, function_spec, open_function
from bonsai.runtime_directory import StateDirectory, locked, open_state
from bonsai.supervisor import kept
from tests.fixtures.waiting import wait_until

LENGTH = """
import os, sys, threading

def reward(prompt, completions):
    print("a print of the function's", flush=True)
    if "hang" in completions:
        open("hanging", "w").close()
        threading.Event().wait()  # a function that never returns; the test ends it
    if "die" in completions:
        os._exit(7)
    if "exit" in completions:
        sys.exit("enough")
    if "raise" in completions:
        raise KeyError("private text")
    return [len(prompt) + len(text) for text in completions]
"""


class Served:
    """A function behind its socket."""

    def __init__(self, process: subprocess.Popen[str], socket: Path) -> None:
        self.process = process
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://x", timeout=30)

    @property
    def model(self) -> str:
        return str(self.client.get("/v1/models").json()["data"][0]["id"])

    def post(self, *completions: str, **changes: object) -> httpx.Response:
        asked = {"model": self.model, "prompt": "p", "messages": None, "completions": completions}
        return self.client.post("/score", json=asked | changes)

    def rewards(self, *completions: str) -> list[float | None]:
        return list(self.post(*completions).json()["rewards"])


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    return directory


@contextmanager
def serving(sources: Path, name: str = "rewards:reward", **options: object) -> Iterator[Served]:
    """As by hand, in the directory of its source."""
    with tempfile.TemporaryDirectory(prefix="bonsai-fn-") as place:
        socket = Path(place) / "reward.sock"
        flags = [f"--{option}={value}" for option, value in options.items()]
        command = [sys.executable, "-m", "bonsai.function_reward", name, "--uds", str(socket), *flags]
        environment = function_environment(os.environ)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=sources, env=environment, **pipes) as process:  # type: ignore[call-overload]
            served = Served(process, socket)
            try:
                # A socket that is there is not yet listened at: the server says when it is.
                said = process.stdout.readline()
                assert f"at unix://{socket}" in said, said + process.stdout.read()
                with served.client:
                    yield served
            finally:
                process.terminate()


def written(sources: Path, text: str = LENGTH) -> None:
    (sources / "rewards.py").write_text(text)


def test_a_function_answers_in_the_schema_of_a_program(sources):
    written(sources)
    with serving(sources) as served:
        assert served.rewards("a", "bbb") == [2.0, 4.0]
        turns = [{"role": "user", "content": "hi"}] * 3
        assert served.post("a", messages=turns).json() == {"rewards": [4.0], "reasons": [None]}


def test_what_it_raises_is_no_reward_and_ends_nothing(sources):
    written(sources)
    with serving(sources, processes=1) as served:
        assert served.post("raise", "b").json() == {
            "rewards": [None, None],
            "reasons": ["the function raised KeyError"] * 2,
        }
        assert served.post("exit").json()["reasons"] == ["the function raised SystemExit"]
        assert served.rewards("a") == [2.0]


def test_a_call_that_hangs_holds_up_nobody(sources):
    written(sources)
    with serving(sources, processes=2, seconds=3600) as served:
        asking = threading.Thread(target=lambda: suppress_errors(served.post, "hang"))
        asking.start()
        wait_until((sources / "hanging").exists)
        assert served.rewards("a") == [2.0]
        assert served.client.get("/v1/models").status_code == 200
        assert asking.is_alive()
        served.process.terminate()
        asking.join()


def test_a_call_that_hangs_is_ended_at_its_deadline_and_a_new_process_stands_in_its_place(sources):
    written(sources)
    with serving(sources, processes=1, seconds=1) as served:
        [before] = descendants(served.process.pid)
        reply = served.post("hang")
        assert (reply.status_code, reply.json()["error"]["message"]) == (504, "the function took longer than 1 s")
        wait_until(lambda: served.post("a").status_code == 200, seconds=30)
        assert descendants(served.process.pid) != [before]


def test_a_process_that_dies_under_a_call_fails_that_call_alone(sources):
    written(sources)
    with serving(sources, processes=1) as served:
        assert (served.post("die").status_code, served.rewards("a")) == (500, [2.0])
        [child] = descendants(served.process.pid)
        os.kill(child, signal.SIGKILL)
        # The next call finds it dead; the one after finds its successor.
        wait_until(lambda: served.post("a").status_code == 200, seconds=30)
        assert descendants(served.process.pid) != [child]


def test_a_killed_server_leaves_no_process_behind_even_one_that_hangs(sources):
    written(sources)
    with serving(sources, processes=2, seconds=60) as served:
        children = descendants(served.process.pid)
        asking = threading.Thread(target=lambda: suppress_errors(served.post, "hang"))
        asking.start()
        wait_until((sources / "hanging").exists)
        served.process.kill()
        served.process.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children))
        asking.join()


def suppress_errors(call: Callable[[str], object], text: str) -> None:
    with suppress(httpx.HTTPError):
        call(text)


def test_calls_beyond_the_queue_find_no_room():
    """Nobody takes any up, since no process is kept: the queue fills."""

    async def fill() -> None:
        function = FunctionProcesses("rewards:reward", processes=1, seconds=1)
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(function.call({})) for _ in range(MOST_WAITING)]
            await asyncio.sleep(0)
            with pytest.raises(NoRoom):
                await function.call({})
            for task in waiting:
                task.cancel()

    asyncio.run(fill())


def test_another_model_and_what_is_no_request_are_refused(sources):
    written(sources)
    with serving(sources) as served:
        assert served.post("a", model="rm-" + "0" * 16).status_code == 404
        assert served.post("a", completions="abc").status_code == 422
        assert served.client.post("/score", content=b"{").status_code == 422


def test_a_changed_source_is_another_reward_model_and_is_not_served_under_the_old_name(sources):
    written(sources)
    with serving(sources, processes=1) as served:
        first = served.model
        written(sources, LENGTH + "\n# changed\n")
        assert served.rewards("a") == [2.0]  # what is loaded is what it was
        served.post("die")
        assert served.process.wait(30) != 0
        assert "the source of rewards:reward has changed" in (
            served.process.stdout.read() if served.process.stdout else ""
        )
    with serving(sources) as served:
        assert served.model != first


def test_the_id_is_of_the_name_the_source_and_what_the_function_adds(sources):
    def identity(text: str, name: str = "rewards:reward") -> str:
        written(sources, text)
        return opened(sources, name).id

    plain = "def reward(prompt, completions): return [0.0]\nother = reward\n"
    factory = "from bonsai.verifiable import matches\nreward = matches({!r})\n"
    known = "from bonsai.verifiable import exact_answer\nreward = exact_answer('answers.jsonl')\n"
    found = [identity(plain), identity(plain + "#"), identity(plain, "rewards:other")]
    found += [identity(factory.format("a")), identity(factory.format("b"))]
    for answer_of_1 in ("1", "2"):
        (sources / "answers.jsonl").write_text(f'{{"prompt": "1", "answer": "{answer_of_1}"}}\n')
        found.append(identity(known))
    assert len(set(found)) == len(found)
    assert identity(plain) == found[0]


def opened(sources: Path, name: str) -> RewardFunction:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sources)
        return open_function(name, 10, os.environ)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rewards", "named module:function"),
        ("rewards:a.b", "named module:function"),
        ("../rewards:reward", "named module:function"),
        ("absent:reward", "there is no module absent in .*sources or on PYTHONPATH"),
        ("package.absent:reward", "there is no module package"),
        ("needy:reward", "the module needy imports no_such_library, which is not installed"),
        ("broken:reward", "the module broken cannot be imported: SyntaxError"),
        ("leaving:reward", "the module leaving cannot be imported: SystemExit: 3"),
        ("rewards:absent", "the module rewards has no absent"),
        ("rewards:NUMBER", "no ordinary function"),
        ("rewards:later", "no ordinary function"),
        ("dying:reward", "importing dying:reward ended Python"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_words_before_anything_starts(sources, name, words):
    written(sources, LENGTH + "\nNUMBER = 3\nasync def later(prompt, completions): return []\n")
    (sources / "needy.py").write_text("import no_such_library\n")
    (sources / "broken.py").write_text("def reward(:\n")
    (sources / "leaving.py").write_text("import sys; sys.exit(3)\n")
    (sources / "dying.py").write_text("import os; os._exit(0)\n")
    with pytest.raises(FunctionError, match=words):
        opened(sources, name)


def test_a_file_of_the_users_named_like_one_of_ours_is_theirs_alone(sources):
    """Both are imported from where they belong: the server's `json` and `bonsai`, and the user's own."""
    (sources / "json.py").write_text("def reward(prompt, completions): return [42.0 for _ in completions]\n")
    (sources / "worker.py").write_text("from worker_help import reward\n")
    (sources / "worker_help.py").write_text("def reward(prompt, completions): return [7.0 for _ in completions]\n")
    with serving(sources, "worker:reward") as served:
        assert served.rewards("a") == [7.0]


@pytest.mark.parametrize(
    ("given", "rewards", "reason"),
    [
        ([1, 2.5], [1.0, 2.5], None),
        ([True, False], [1.0, 0.0], None),
        ((value for value in (1, 2)), [1.0, 2.0], None),
        ([None, 1], [None, 1.0], "the function gave None"),
        ([float("nan"), 1], [None, 1.0], "the function gave no finite number"),
        ([10**400, 1], [None, 1.0], "the function gave no finite number"),
        (["1.0", 1], [None, 1.0], "the function gave no finite number"),
        ([[1], 1], [None, 1.0], "the function gave no finite number"),
        ([1], [None, None], "the function gave 1 rewards for 2 completions"),
        (3, [None, None], "the function raised TypeError"),
        (None, [None, None], "the function raised TypeError"),
    ],
)
def test_whatever_a_function_gives_is_a_reward_or_a_reason(given, rewards, reason):
    said = answer(lambda prompt, completions: given, {"prompt": "p", "messages": None, "completions": ["a", "b"]})
    assert list(said["rewards"]) == rewards
    assert said["reasons"][0] == reason


def test_it_sees_no_setting_of_ours_and_no_hub_token():
    seen = function_environment({"BONSAI_REDIS_URL": "redis://:secret@h", "HF_TOKEN": "secret", "OPENAI_API_KEY": "k"})
    assert "secret" not in " ".join(seen.values())
    assert seen["OPENAI_API_KEY"] == "k"


# --- under the supervisor -------------------------------------------------------------------------------------


@contextmanager
def supervised(state: StateDirectory, spec: ProcessSpec) -> Iterator[Callable[[], str]]:
    """() -> its state and detail, while `bonsai up`'s supervisor keeps it."""
    from anyio.from_thread import start_blocking_portal

    with (
        locked(state),
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(kept(state, "", ((), (spec,)), lambda statuses: None)) as supervisor,
    ):
        yield lambda: " ".join((supervisor.statuses[0].state, supervisor.statuses[0].detail))


@pytest.mark.slow
def test_the_supervisor_starts_it_again_and_never_calls_a_changed_one_ready(sources, tmp_path, monkeypatch):
    written(sources)
    function = opened(sources, "rewards:reward")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    state = open_state(tmp_path / "state", os.environ)
    spec = function_spec("reward", function, state.reward_socket, state, os.environ)
    with supervised(state, spec) as status:
        assert status() == "ready "
        transport = httpx.HTTPTransport(uds=str(state.reward_socket))
        with httpx.Client(transport=transport, base_url="http://x", timeout=30) as client:
            asked = {"model": function.id, "prompt": "p", "completions": ["a"]}
            assert client.post("/score", json=asked).json()["rewards"] == [2.0]
            written(sources, LENGTH + "\n# changed\n")
            kill_server()
            wait_until(lambda: "its source has changed: start the stack again" in status(), seconds=60)
            assert client.post("/score", json=asked).status_code == 404
            written(sources)
            kill_server()
            wait_until(lambda: status() == "ready ", seconds=60)


def kill_server() -> None:
    """The guard's child: it is asked nothing before, since one of its processes may import what was just changed."""
    for child in descendants(os.getpid()):
        with suppress(OSError):  # it may end by itself
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"bonsai.function_reward" in command and b"guard.py" not in command:
                os.kill(child, signal.SIGKILL)
