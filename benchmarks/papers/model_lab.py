"""The demo's language model on the bench, without an engine: draws of it and what they are worth.

Owns sampling and scoring in this process, the ledger that is kept on disk, and the measures of a policy. Does not own
how a policy comes about (`model_jobs`) nor what is said of it (`model`).

Dimension key:  B prompts · M draws per prompt · L tokens · D features
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

import bonsai.demo
from bon_algos.chat import ChatTokenizer, reward_token_ids
from bon_algos.logprobs import TokenGroup, sequence_logprobs
from bon_algos.order import best_of_n_weights, mean_interval, win_rate
from bon_algos.serving_order import serving_ranks
from bon_algos.token_kl import token_terms
from bonsai.demo import grammar
from bonsai.demo.prompts import held_out_prompts, training_prompts
from worker.models import parts_by_tokens

Array = NDArray[np.float64]
Weights = Mapping[str, Tensor]
"""Of a plain model, by name: those that differ from the reference's."""

POLICY: Final = Path(bonsai.demo.__file__).parent / "models" / "policy"
REWARD: Final = POLICY.with_name("reward")
HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
MAX_TOKENS: Final = 64
"""Of a completion; what the service allows by default."""
ROWS: Final = 64
"""Sampled or scored at once: more of them leave the processor's cache, and each costs more."""
PART: Final = 16
"""Prompts of one file of the ledger: what an interrupted build loses at most."""
COMPARED_DRAWS: Final = 8
"""Of a prompt; how many different pairs of words there are depends on how many draws are looked at."""


class Draws(NamedTuple):
    """Equally many completions of some prompts by one policy, scored; in drawing order."""

    prompts: tuple[str, ...]
    prompt_ids: list[list[int]]
    completion_ids: list[list[list[int]]]
    texts: list[list[str]]
    reward: Array
    """(B, M); the reward model's raw logit."""
    is_complete: NDArray[np.bool_]
    """(B, M); neither truncated nor empty."""

    @property
    def order(self) -> Array:
        """(B, M); what serving compares, within these draws."""
        return order_of(self)[0]

    def part(self, rows: Sequence[int], draws: slice = slice(None)) -> Draws:
        """Some of the prompts, one as often as it is named, with some of their draws."""
        return Draws(
            tuple(self.prompts[b] for b in rows),
            [self.prompt_ids[b] for b in rows],
            [self.completion_ids[b][draws] for b in rows],
            [self.texts[b][draws] for b in rows],
            self.reward[list(rows), draws],
            self.is_complete[list(rows), draws],
        )

    @property
    def token_groups(self) -> list[TokenGroup]:
        return [TokenGroup(*pair) for pair in zip(self.prompt_ids, self.completion_ids, strict=True)]


def order_of(*sides: Draws) -> list[Array]:
    """Of each side's draws of the same prompts, on one scale: as they are served. (B, M₁), (B, M₂), …"""
    reward_BM, is_complete_BM = (
        np.hstack([getattr(side, name) for side in sides]) for name in ("reward", "is_complete")
    )
    cuts = np.cumsum([side.reward.shape[1] for side in sides])[:-1]
    return np.split(serving_ranks(reward_BM, is_complete_BM), cuts, axis=1)


class Bench:
    """The demo's models: a reference, a model that wears any policy's weights, and the reward model."""

    def __init__(self) -> None:
        self.reference = plain_model()
        self._worn = with_own_head(plain_model())
        self._plain = {name: parameter.detach().clone() for name, parameter in self._worn.named_parameters()}
        self._reward_model = AutoModelForSequenceClassification.from_pretrained(
            REWARD, dtype=torch.float32, local_files_only=True
        ).eval()
        self._tokenizer, self._reward_tokenizer = _tokenizer(POLICY), _tokenizer(REWARD)

    def wearing(self, weights: Weights) -> PreTrainedModel:
        """The model with these weights, until the next call; an embedding alone is the head's as well."""
        tied = {HEAD: weights[EMBEDDING]} if EMBEDDING in weights else {}
        with torch.no_grad():
            for name, weight in {**self._plain, **tied, **weights}.items():
                self._worn.get_parameter(name).copy_(weight)
        return self._worn

    @torch.no_grad()
    def draw(self, model: PreTrainedModel, prompts: Sequence[str], count: int, seed: int) -> Draws:
        """Completions at temperature 1 with nothing cut off, until the end of sequence or `MAX_TOKENS`."""
        torch.manual_seed(seed)
        prompt_ids = [self._tokenizer.encode_prompt(prompt) for prompt in prompts]
        rows = [ids for ids in prompt_ids for _ in range(count)]
        flat = [one for part in _parts(rows) for one in _continued(model, part)]
        return self.scored(prompts, [flat[start : start + count] for start in range(0, len(flat), count)])

    def scored(self, prompts: Sequence[str], completion_ids: list[list[list[int]]]) -> Draws:
        texts = [[self._tokenizer.decode(ids) for ids in group] for group in completion_ids]
        rows = [
            reward_token_ids(self._reward_tokenizer, prompt, None, text)
            for prompt, group in zip(prompts, texts, strict=True)
            for text in group
        ]
        return self.draws_of(prompts, completion_ids, np.array(self._scores(rows)).reshape(len(prompts), -1))

    def draws_of(self, prompts: Sequence[str], completion_ids: list[list[list[int]]], reward_BM: Array) -> Draws:
        """Completions whose rewards are known."""
        prompt_ids = [self._tokenizer.encode_prompt(prompt) for prompt in prompts]
        texts = [[self._tokenizer.decode(ids) for ids in group] for group in completion_ids]
        end = self.reference.config.eos_token_id
        is_complete_BM = np.array(
            [
                [ids[-1] == end and text.strip() != "" for ids, text in zip(group, own, strict=True)]
                for group, own in zip(completion_ids, texts, strict=True)
            ]
        )
        return Draws(tuple(prompts), prompt_ids, completion_ids, texts, reward_BM, is_complete_BM)

    @torch.no_grad()
    def _scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        scores: list[float] = []
        for part in _parts(rows):
            scores += self._reward_model(input_ids=_padded(part, left=False)).logits[:, 0].double().tolist()
        return scores

    @torch.no_grad()
    def logprobs(self, model: PreTrainedModel, draws: Draws) -> Array:
        """log of the model's probability of every completion; nats. (B, M)"""
        groups = draws.token_groups
        rows = [row for part in parts_by_tokens(groups) for row in sequence_logprobs(model, groups[part])]
        return torch.stack(rows).double().numpy()

    @torch.no_grad()
    def kl(self, model: PreTrainedModel, own: Draws) -> Array:
        """Σ_t KL(π ‖ π_ref) of the next token along each of the model's own completions: in the mean the KL of the two
        policies, with far less noise than the sum of log-ratios; nats. (B, M)"""
        groups = own.token_groups
        parts = [token_terms(model, groups[part], self._as_reference) for part in parts_by_tokens(groups)]
        return torch.stack([terms.kl_NL.sum(dim=-1) for part in parts for terms in part]).double().numpy()

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        worn = {name: parameter.data for name, parameter in self._worn.named_parameters()}
        try:
            for name, parameter in self._worn.named_parameters():
                parameter.data = self._plain[name]
            yield
        finally:
            for name, parameter in self._worn.named_parameters():
                parameter.data = worn[name]

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> Tensor:
        """The reference's last hidden state of each prompt's last token, standardised over prompts. (B, D), float64"""
        decoder = self.reference.get_decoder()
        rows = [torch.tensor([self._tokenizer.encode_prompt(prompt)]) for prompt in prompts]
        feature_BD = torch.stack([decoder(input_ids=row).last_hidden_state[0, -1] for row in rows]).double()
        return (feature_BD - feature_BD.mean(dim=0)) / feature_BD.std(dim=0)


def plain_model() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32, local_files_only=True)
    return model.eval()


def with_own_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its embedding copied for its head, which an adapter may change alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    return model


def _tokenizer(directory: Path) -> ChatTokenizer:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    return ChatTokenizer((directory / "tokenizer.json").read_text(), config)


def _parts(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    return (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


def _continued(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """One completion of each row, its end of sequence included."""
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    as_trained = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=end,
        pad_token_id=pad,
    )
    ids_RL = _padded(rows, left=True)
    mask_RL = torch.tensor([[0] * (ids_RL.shape[1] - len(row)) + [1] * len(row) for row in rows])
    drawn = model.generate(input_ids=ids_RL, attention_mask=mask_RL, generation_config=as_trained)
    completions = drawn[:, ids_RL.shape[1] :].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions]


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> Tensor:
    """(R, L), padded with 0: the padding token of both models."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, fill, strict=True)])


# --- the ledger ------------------------------------------------------------------------------------------


class Ledger(NamedTuple):
    """The reference's draws, with their log-probs under it."""

    draws: Draws
    logprob: Array
    """(B, M); nats."""


class Part(NamedTuple):
    """One file of the ledger."""

    side: str
    """`train` or `held_out`."""
    number: int
    draws: int
    """Of each prompt."""

    @property
    def prompts(self) -> tuple[str, ...]:
        prompts = training_prompts() if self.side == "train" else held_out_prompts()
        return prompts[self.number * PART : (self.number + 1) * PART]

    def file(self, directory: Path) -> Path:
        return directory / f"{self.side}-{self.draws}-{self.number}.safetensors"


def build_part(bench: Bench, part: Part, directory: Path) -> None:
    """Draw a part of the ledger, unless it is there: written aside, then renamed."""
    file = part.file(directory)
    if file.exists():
        return
    draws = bench.draw(bench.reference, part.prompts, part.draws, seed=part.number)
    flat = [ids for group in draws.completion_ids for ids in group]
    arrays = {
        "token": np.concatenate([np.array(ids, dtype=np.int32) for ids in flat]),
        "length": np.array([len(ids) for ids in flat], dtype=np.int32),
        "reward": draws.reward,
    }
    if part.side == "train":
        arrays["logprob"] = bench.logprobs(bench.reference, draws)
    directory.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    save_file(arrays, aside)
    aside.rename(file)


def read_draws(bench: Bench, parts: Sequence[Part], directory: Path) -> Draws:
    """Of parts that are built."""
    completions: list[list[list[int]]] = []
    rewards: list[Array] = []
    for part in parts:
        arrays = load_file(part.file(directory))
        flat = [ids.tolist() for ids in np.split(arrays["token"], np.cumsum(arrays["length"])[:-1])]
        completions += [flat[start : start + part.draws] for start in range(0, len(flat), part.draws)]
        rewards.append(arrays["reward"])
    prompts = [prompt for part in parts for prompt in part.prompts]
    return bench.draws_of(prompts, completions, np.concatenate(rewards))


def read_ledger(bench: Bench, parts: Sequence[Part], directory: Path) -> Ledger:
    """Of training parts that are built."""
    logprobs = [load_file(part.file(directory))["logprob"] for part in parts]
    return Ledger(read_draws(bench, parts, directory), np.concatenate(logprobs))


def parts_of(side: str, num_prompts: int, draws: int) -> list[Part]:
    return [Part(side, number, draws) for number in range(num_prompts // PART)]


# --- what a policy is worth ------------------------------------------------------------------------------


class Judged(BaseModel):
    """One policy on held-out prompts, one sample each time."""

    model_config = ConfigDict(frozen=True)

    step: int
    reward: float
    gold: float
    gain_share: float
    """Of the reward that best-of-16 gains over one sample of the reference."""
    win_rate: float
    """Against one draw of the reference, ties by half."""
    kl: float
    """KL(policy ‖ reference), see `Bench.kl`; nats."""
    kl_error: float
    """Half of its 95 % interval over prompts."""
    length: float
    """Tokens."""
    distinct_2: float
    """Different pairs of neighbouring words among all pairs of a prompt's `COMPARED_DRAWS` completions."""
    truncated: float
    """Share of completions without an end."""


def judge(bench: Bench, weights: Weights, reference: Draws, *, draws: int, seed: int, step: int) -> Judged:
    model = bench.wearing(weights)
    own = bench.draw(model, reference.prompts, draws, seed)
    kl = mean_interval(bench.kl(model, own).mean(axis=1))
    best, one = best_of(reference.reward, reference.order, 16).mean(), reference.reward.mean()
    return Judged(
        step=step,
        reward=float(own.reward.mean()),
        gold=float(gold_of(own).mean()),
        gain_share=float((own.reward.mean() - one) / (best - one)),
        win_rate=win_rate(*order_of(own, reference)).mean,
        kl=kl.mean,
        kl_error=kl.high - kl.mean,
        length=float(lengths_of(own).mean()),
        distinct_2=distinct_2([group[:COMPARED_DRAWS] for group in own.texts]),
        truncated=float((~own.is_complete).mean()),
    )


def gold_of(draws: Draws) -> Array:
    """(B, M)"""
    pairs = zip(draws.prompts, draws.texts, strict=True)
    return np.array([[grammar.gold_reward(prompt, text) for text in group] for prompt, group in pairs])


def lengths_of(draws: Draws) -> Array:
    """Tokens. (B, M)"""
    return np.array([[len(ids) for ids in group] for group in draws.completion_ids], dtype=np.float64)


def distinct_2(texts: Sequence[Sequence[str]]) -> float:
    """Mean over prompts; completions of one prompt are pooled."""
    shares = []
    for group in texts:
        pairs = [pair for text in group for pair in pairwise(grammar.words(text))]
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return float(np.mean(shares))


def best_of(value_BM: Array, order_BM: Array, n: int) -> Array:
    """Expected value of what best-of-n serves, for each prompt, by Rao–Blackwell weights. (B, M), (B, M) -> (B,)"""
    weights = [best_of_n_weights(order_M, n) for order_M in order_BM]
    return np.array([weight_M @ value_M for weight_M, value_M in zip(weights, value_BM, strict=True)])


def winners(draws: Draws, n: int) -> list[list[str]]:
    """What best-of-n serves from each prompt's disjoint blocks of n draws, `COMPARED_DRAWS` times."""
    blocks = [range(start, start + n) for start in range(0, COMPARED_DRAWS * n, n)]
    return [
        [texts[max(block, key=lambda j, order_M=order_M: order_M[j])] for block in blocks]  # type: ignore[misc]
        for texts, order_M in zip(draws.texts, draws.order, strict=True)
    ]
