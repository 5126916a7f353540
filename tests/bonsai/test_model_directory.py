"""Which directories are models, what they are called, and what is said of the others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bonsai.model_directory import BadModel, model_digest, open_model, policy_id, resolve, reward_model_id

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
REWARD = LLAMA | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def write_model(path: Path, config: dict[str, Any], weights: bytes = b"weights") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_policy_and_its_cost(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path, LLAMA), "policy", longest=8192)
    # keys and values · 3 layers · 2 heads · 32 dimensions · 4 bytes
    assert (model.max_model_len, model.cache_bytes_per_token) == (512, 2 * 3 * 2 * 32 * 4)


def test_a_long_window_is_capped(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path, LLAMA | {"max_position_embeddings": 131_072}), "policy", longest=4096)
    assert model.max_model_len == 4096


@pytest.mark.parametrize(
    ("role", "config", "said"),
    [
        ("policy", REWARD, "does not generate"),
        ("reward", LLAMA, "is no reward model"),
        ("reward", REWARD | {"id2label": {"0": "bad", "1": "good"}}, "one label, this one has 2"),
        ("policy", LLAMA | {"architectures": []}, "architectures"),
        ("policy", LLAMA | {"num_hidden_layers": "many"}, "num_hidden_layers"),
    ],
)
def test_a_model_in_the_wrong_role(tmp_path: Path, role: Any, config: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        open_model(write_model(tmp_path, config), role, longest=512)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (write_model(tmp_path, LLAMA) / missing).unlink()
    with pytest.raises(BadModel, match=missing.removeprefix("model")):
        open_model(tmp_path, "policy", longest=512)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    (write_model(tmp_path, LLAMA) / "config.json").write_text("{")
    with pytest.raises(BadModel, match=r"config\.json"):
        open_model(tmp_path, "policy", longest=512)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    nowhere = resolve(str(tmp_path / "nowhere"), "policy", tmp_path)
    with pytest.raises(BadModel, match="neither a directory nor a hub id"):
        open_model(nowhere, "policy", longest=512)


def test_a_directory_wins_over_a_hub_id_of_the_same_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "owner" / "name", LLAMA)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name", "policy", tmp_path) == Path("owner/name")


def test_without_the_demo_models_one_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="build-demo"):
        resolve("", "policy", tmp_path / "models")


def test_the_id_is_the_content_not_the_place(tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    here = model_digest(write_model(tmp_path / "a", LLAMA), cache)
    there = model_digest(write_model(tmp_path / "b", LLAMA), cache)
    other = model_digest(write_model(tmp_path / "c", LLAMA, b"others"), cache)
    assert here == there != other
    assert policy_id(here) == f"pol-{here[:16]}"
    assert reward_model_id(here) == f"rm-{here[:16]}"


def test_a_readme_does_not_change_the_id(tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = model_digest(write_model(tmp_path / "a", LLAMA), cache)
    (tmp_path / "a" / "README.md").write_text("a model")
    assert model_digest(tmp_path / "a", cache) == before


def test_known_weights_are_not_read_again(tmp_path: Path) -> None:
    """Same size and time: the cache is believed, which is what makes a second start of a big model quick."""
    cache = tmp_path / "digests.json"
    model = write_model(tmp_path / "a", LLAMA, b"one")
    before = model_digest(model, cache)
    weights = model / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    weights.write_bytes(b"two")
    os.utime(weights, ns=times)
    assert model_digest(model, cache) == before
    os.utime(weights, ns=(times[0], times[1] + 1))
    assert model_digest(model, cache) != before


def test_a_broken_cache_is_no_cache(tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    model = write_model(tmp_path / "a", LLAMA)
    before = model_digest(model, cache)
    cache.write_text("{")
    assert model_digest(model, cache) == before
