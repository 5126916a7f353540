"""An engine over a Unix socket that really samples a tiny Llama and really applies adapters; for faults.

Owns the few calls of vLLM that the worker makes, answered in vLLM's form, and switches that make it fail. It
stands in for vLLM where a fault must be planted; what vLLM itself does is for the tests with the real stack.
Adapters are read by PEFT, not by the code under test.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM

from tests.worker import world
from worker.models import unwarned_of_tied_embeddings


def save_tokenizer(directory: Path) -> None:
    """Word-level: token i is the word `wi`; the end of the sequence is no word."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(world.VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))


def _token_of(word):
    return int(word[1:]) if word[1:].isdigit() else 0  # as the tokenizer has it for what it does not know


def text_of(token_ids):
    return "".join(f" w{token}" for token in token_ids if token != world.END)


class StubEngine:
    """Both engines in one: `with StubEngine(directory, socket) as engine`."""

    def __init__(self, policy_directory: Path, socket: Path) -> None:
        self.url = f"unix://{socket}"
        self.adapters: dict[str, torch.nn.Module] = {}
        self.names_ever: list[str] = []
        self.ignores_adapters = False
        self.is_away = False
        self.away_for = 0
        """Requests still to be refused."""
        self.largest_rank = 32
        self.requests: list[dict[str, Any]] = []
        self._socket = socket
        self._base = LlamaForCausalLM.from_pretrained(policy_directory).eval()
        self._generator = torch.Generator().manual_seed(17)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._is_up = threading.Event()

    def __enter__(self):
        self._thread.start()
        assert self._is_up.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self):
        app = web.Application(middlewares=[self._away])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/classify", self._classify)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.UnixSite(runner, str(self._socket)).start())
        self._loop.call_soon(self._is_up.set)
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    @web.middleware
    async def _away(self, request, handler):
        self.away_for -= 1
        if self.is_away or self.away_for >= 0:
            return web.Response(status=503)
        return await handler(request)

    async def _models(self, _):
        return web.json_response({"data": [{"id": name} for name in (world.BASE, *self.adapters)]})

    async def _load(self, request):
        body = await request.json()
        name = body["lora_name"]
        if name in self.names_ever:
            return web.json_response({"error": {"message": f"{name} was used before"}}, status=400)
        self.names_ever.append(name)
        rank = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())["r"]
        if rank > self.largest_rank:
            message = f"LoRA rank {rank} is greater than max_lora_rank {self.largest_rank}."
            return web.json_response({"error": {"message": message}}, status=500)
        with unwarned_of_tied_embeddings():
            self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self._base), body["lora_path"]).eval()
        return web.Response(text="Success")

    async def _unload(self, request):
        del self.adapters[(await request.json())["lora_name"]]
        return web.Response(text="Success")

    async def _complete(self, request):
        body = await request.json()
        self.requests.append(body)
        model = self._base if body["model"] == world.BASE else self.adapters.get(body["model"])
        if model is None:
            return web.Response(status=404)
        model = self._base if self.ignores_adapters else model
        choices = []
        for index in range(body["n"]):
            token_ids, logprobs = world.draw(model, body["prompt"], self._generator)
            choices.append(
                {
                    "index": index,
                    "text": text_of(token_ids),
                    "token_ids": token_ids,
                    "logprobs": {"token_logprobs": logprobs},
                    "finish_reason": "stop" if token_ids[-1] == world.END else "length",
                }
            )
        return web.json_response({"choices": choices})

    async def _classify(self, request):
        """The mean token, prompt included: high words are good."""
        body = await request.json()
        read = [[_token_of(word) for word in text.split()] for text in body["input"]]
        scores = [sum(ids) / len(ids) for ids in read]
        return web.json_response({"data": [{"index": i, "probs": [score]} for i, score in enumerate(scores)]})
