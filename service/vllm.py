"""The policy engine: draw candidates, give log-probs, load and unload adapters.

Owns: the calls to one vLLM server and when a drawing may stop. Does not own: the wire format
(bon_algos/vllm_protocol.py), sockets (engine_http.py), which policy is asked (best_of_n.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from bon_algos.contracts import Candidate, Sampling
from bon_algos.vllm_protocol import (
    CompletionStream,
    Listener,
    canary_request,
    completion_request,
    forced_token_request,
    parse_completion,
    parse_forced_token,
)
from service.engine_http import EngineHttp
from service.errors import EngineBroken, EngineRefused, EngineUnavailable, GatewayError, InvalidField, PolicyNotServed

CHANGE_SECONDS: Final = 120.0
PROBE_SECONDS: Final = 120.0
LIST_SECONDS: Final = 2.0
STARTED_AT: Final = "/metrics?name[]=process_start_time_seconds"


class AdapterRefused(Exception):
    """The engine does not take this adapter; the text is its own reason, cut short."""


class EngineState(NamedTuple):
    """What an engine says of itself."""

    models: Mapping[str, str | None]
    """Names it serves -> the directory each was loaded from, where it tells; its base first."""
    started_at: float | None
    """Of its process, Unix seconds: another one is another life. None: it does not tell."""


class DrawingWindow(NamedTuple):
    """When a drawing ends before all candidates have finished; times of the event loop's clock."""

    soft: float
    """From here on `quorum` finished candidates are enough."""
    hard: float
    quorum: int


class PolicyEngine:
    """One vLLM server."""

    def __init__(self, url: str) -> None:
        self._http = EngineHttp(
            url,
            title="policy engine",
            unavailable=EngineUnavailable,
            not_served=PolicyNotServed,
            broken_code="engine_broken",
        )

    async def close(self) -> None:
        await self._http.close()

    async def sample(
        self,
        policy: str,
        prompt_token_ids: Sequence[int],
        n: int,
        sampling: Sampling,
        window: DrawingWindow,
        hear: Listener | None = None,
        came: Callable[[], None] = lambda: None,
    ) -> list[Candidate]:
        """n candidates in drawing order by one streamed call; one that had not finished when the window closed
        has failure `deadline`. Leaving the call is what stops the engine's work on it. `hear` is told each piece as
        it arrives; `came` is called when something does, and costs no look at it.

        Raises EngineUnavailable and PolicyNotServed (503: nothing was accepted), EngineBroken (502: never tried
        again).
        """
        stream = CompletionStream(n, hear, has_alternatives=sampling.top_logprobs > 0)
        body = completion_request(policy, prompt_token_ids, n, sampling, stream=True)
        loop = asyncio.get_running_loop()
        # Not by the clock: a timer may come a little before its time, and comes once.
        is_late = False
        try:
            async with asyncio.timeout_at(window.hard) as limit:

                def end_if_enough() -> None:
                    nonlocal is_late
                    is_late = True
                    if stream.finished >= window.quorum:
                        limit.reschedule(window.soft)

                soft = loop.call_at(window.soft, end_if_enough)
                try:
                    async with self._http.stream("/v1/completions", body, _max_bytes(n, sampling), came) as events:
                        if hear is None:
                            await events.whole(window.soft)
                        while (chunks := await events.more()) is not None:
                            for chunk in chunks:
                                stream.feed(chunk)
                            if is_late and stream.finished >= window.quorum:
                                return stream.candidates()
                finally:
                    soft.cancel()
        except TimeoutError:
            return stream.candidates()
        except EngineRefused:
            if sampling.json_schema is None:
                raise
            raise InvalidField("the engine cannot hold candidates to this schema", param="json_schema") from None
        if not stream.is_complete:
            raise EngineBroken(f"the policy engine finished {stream.finished} of {n} candidates")
        return stream.candidates()

    async def logprobs(
        self, policy: str, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]
    ) -> list[float]:
        """Log-prob of each completion token under the policy, nats: what a fingerprint is compared with."""
        tokens = [*prompt_token_ids, *completion_token_ids]
        with self._http.translated():
            async with asyncio.timeout(PROBE_SECONDS):
                return await asyncio.gather(
                    *(self._logprob(policy, tokens[:i], tokens[i]) for i in range(len(prompt_token_ids), len(tokens)))
                )

    async def _logprob(self, policy: str, prefix_token_ids: Sequence[int], token: int) -> float:
        body = await self._http.post("/v1/completions", forced_token_request(policy, prefix_token_ids, token))
        return parse_forced_token(body, token)

    async def give_a_token(self, policy: str) -> None:
        """Have the engine sample one token, ahead of everything that waits. How long it may take is the caller's
        affair. Raises as `sample` does."""
        with self._http.translated():
            parse_completion(await self._http.post("/v1/completions", canary_request(policy)), 1)

    async def models(self) -> list[str]:
        """Names the engine serves: its base first, then the adapters it has loaded."""
        return model_names(await self._http.get("/v1/models", LIST_SECONDS))

    async def observe(self) -> EngineState:
        """What it serves from where, and since when it lives. Raises as `models` does."""
        body = await self._http.get("/v1/models", LIST_SECONDS)
        roots = ((str(card["id"]), card.get("root")) for card in _cards(body))
        models = {name: root if isinstance(root, str) else None for name, root in roots}
        try:
            status, text = await self._http.get_text(STARTED_AT, LIST_SECONDS)
        except GatewayError:
            return EngineState(models, None)
        return EngineState(models, started_at(text) if status == 200 else None)

    async def load_adapter(self, policy: str, directory: str) -> None:
        """Make an adapter ready under the policy's name. Raises AdapterRefused. Loading twice is no error."""
        await self._change(
            "/v1/load_lora_adapter", {"lora_name": policy, "lora_path": directory}, "already been loaded"
        )

    async def unload_adapter(self, policy: str) -> None:
        """Forget an adapter. One that is not there is no error."""
        await self._change("/v1/unload_lora_adapter", {"lora_name": policy}, "cannot be found")

    async def _change(self, path: str, body: dict[str, str], done_already: str) -> None:
        status, text = await self._http.post_for_status(path, dict(body), CHANGE_SECONDS)
        if status in (429, 503):
            raise EngineUnavailable("the policy engine has no room for this request now")
        if status != 200 and done_already not in text:
            raise AdapterRefused(text[:500])


def started_at(metrics: str) -> float | None:
    """The start of a process, by Prometheus' own words for it."""
    found = re.search(r"^process_start_time_seconds ([0-9.e+]{1,32})$", metrics, re.MULTILINE)
    try:
        return None if found is None else float(found[1])
    except ValueError:
        return None


def model_names(body: Mapping[str, Any]) -> list[str]:
    """The ids of a `/v1/models` list."""
    return [str(card["id"]) for card in _cards(body)]


def _cards(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    cards = body.get("data")
    if not isinstance(cards, list):
        raise EngineBroken("an engine did not list its models")
    return [card for card in cards if isinstance(card, dict) and "id" in card]


def _max_bytes(n: int, sampling: Sampling) -> int:
    """More than n candidates ever take on the wire. A token that comes as a chunk of its own has a frame of about 400
    bytes, its text, its id and its log-prob thrice quoted, and each alternative an id and a number."""
    of_a_token = 1024 + 64 * (sampling.top_logprobs + 1)
    return n * (sampling.max_tokens * of_a_token + 16_384)
