"""Adapters that come from elsewhere and go elsewhere: what is taken, and that peft and transformers see what we see."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bon_algos.crash_points import CRASH_AT
from bon_algos.logprobs import TokenGroup, token_logprobs
from bonsai.registry.importing import AdapterRefused, Base, import_adapter
from bonsai.registry.merging import merge
from bonsai.stack_plan import SHIPPED_MODELS
from service.artefacts import checked_adapter, read_manifest
from service.export import archive_of, unpack
from worker.models import open_policy, unwarned_of_tied_embeddings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BASE = Base(SHIPPED_MODELS / "policy", "pol-" + "0" * 16)
GROUPS = [TokenGroup([3, 1, 4], [[1, 5, 9, 2, 6, 5, 3, 5]])]
RANK = 4


@pytest.fixture(scope="module")
def made_elsewhere(tmp_path_factory) -> Path:
    """An adapter that changes something, on every layer and the head."""
    policy = open_policy(
        BASE.directory, "gpt-of-somebody", rank=RANK, alpha=8, train_factor_a=True, seed=1, device=torch.device("cpu")
    )
    draw = torch.Generator().manual_seed(1)
    policy.load_factors(
        {name: one + 0.02 * torch.randn(one.shape, generator=draw) for name, one in policy.factors.items()}
    )
    directory: Path = tmp_path_factory.mktemp("elsewhere") / "adapter"
    policy.save_adapter(directory)
    (directory / "README.md").write_text("somebody else's")
    return directory


@pytest.fixture
def copy(made_elsewhere, tmp_path) -> Path:
    return Path(shutil.copytree(made_elsewhere, tmp_path / "adapter"))


def imported(source: Path, artefacts: Path, max_rank: int = 8):
    return import_adapter(source, BASE, artefacts, n=16, max_rank=max_rank, by="somebody", tenant="default")


def worn(directory: Path):
    base = AutoModelForCausalLM.from_pretrained(BASE.directory, dtype=torch.float32)
    with unwarned_of_tied_embeddings():
        return PeftModel.from_pretrained(base, directory).eval()


def said(model, groups=GROUPS) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([logprob_L for group in token_logprobs(model, groups) for logprob_L in group])


@pytest.mark.parametrize(("point", "named"), [("import.written", 0), ("import.renamed", 1)])
def test_an_import_that_is_killed_is_there_whole_or_not_at_all_and_may_be_made_again(
    point, named, made_elsewhere, tmp_path
):
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.bonsai.test_registry_files import imported\n"
        "imported(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    asked = [sys.executable, "-c", code, str(made_elsewhere), str(tmp_path)]
    done = subprocess.run(asked, env={**os.environ, CRASH_AT: point}, cwd=ROOT)
    assert done.returncode == -9
    visible = [path.name for path in (tmp_path / "policies").glob("[!.]*")]
    assert len(visible) == named
    manifest = imported(made_elsewhere, tmp_path)
    assert [path.name for path in (tmp_path / "policies").glob("[!.]*")] == [manifest.digest]
    kept = read_manifest(tmp_path, manifest.digest)
    checked_adapter(tmp_path, kept, max_rank=8)


def test_an_import_is_whole_the_same_every_time_and_its_fingerprint_is_what_peft_says(made_elsewhere, tmp_path):
    manifest = imported(made_elsewhere, tmp_path)
    assert imported(made_elsewhere, tmp_path).policy_id == manifest.policy_id
    assert [path.name for path in tmp_path.iterdir()] == ["policies"]
    assert [path.name for path in (tmp_path / "policies").iterdir()] == [manifest.digest]
    assert manifest.imported is not None
    assert (manifest.imported.by, manifest.n_equivalent, manifest.job_id) == ("somebody", 16, None)
    directory, proof = checked_adapter(tmp_path, manifest, max_rank=8)
    groups = [
        TokenGroup(prompt, [completion])
        for prompt, completion in zip(proof.prompt_token_ids, proof.completion_token_ids, strict=True)
    ]
    expected = torch.tensor([one for row in proof.policy_logprobs for one in row])
    torch.testing.assert_close(said(worn(directory), groups), expected, atol=1e-4, rtol=0)
    assert len(expected) >= 256


def config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return write


def first_replaced(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: {**tensors, min(tensors): make(tensors[min(tensors)])})


def cut(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def linked(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.rename(directory.parent / "weights")
    file.symlink_to(directory.parent / "weights")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda d: (d / "adapter_model.bin").write_bytes(b"\x80\x04."), "only safetensors"),
        (lambda d: (d / "optimizer.pt").write_bytes(b"PK"), "only safetensors"),
        (lambda d: (d / "modeling.py").write_text("import os"), "only safetensors"),
        (linked, "not a plain file"),
        (lambda d: (d / "adapter_config.json").unlink(), "lacks"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "0 bytes"),
        (cut, "do not end with the file|beyond the end"),
        (first_replaced(lambda one: one * float("nan")), "not finite"),
        (first_replaced(lambda one: one[:, :-1].contiguous()), "needs"),
        (weights(lambda tensors: {f"{name}x": one for name, one in tensors.items()}), "no layer of the base"),
        (weights(lambda tensors: {name: one for name, one in tensors.items() if name != min(tensors)}), "has no"),
        (weights(lambda tensors: {name: 0 * one for name, one in tensors.items()}), "changes nothing"),
        (config(r=9), "r must be 1 to the engine's 8"),
        (config(r="4"), "r must be"),
        (config(peft_type="LOHA"), "peft_type"),
        (config(use_dora=True), "use_dora"),
        (config(modules_to_save=["embed_tokens"]), "modules_to_save"),
        (config(auto_mapping={"base_model_class": "X"}), "auto_mapping"),
        (config(base_model_name_or_path="pol-" + "9" * 16), "for the base pol-9"),
        (config(target_modules="all-linear"), "target_modules"),
        (lambda d: (d / "adapter_config.json").write_text("[" * 5000), "not JSON"),
    ],
)
def test_P11_P12_P13_what_is_no_plain_adapter_of_this_base_is_refused(copy, tmp_path, harm, why):
    harm(copy)
    with pytest.raises(AdapterRefused, match=why):
        imported(copy, tmp_path / "artefacts")
    assert not list((tmp_path / "artefacts").glob("policies/*"))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_merged_model_says_what_base_and_adapter_say(made_elsewhere, tmp_path, is_tied):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(BASE.directory, dtype=torch.float32)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == bool(model.config.tie_word_embeddings)
    if is_tied:
        head.weight = embeddings.weight
    else:
        head.weight = torch.nn.Parameter(1.1 * head.weight.detach())
        model.all_tied_weights_keys = {}
    model.config.tie_word_embeddings = is_tied
    shutil.copytree(BASE.directory, base)
    model.save_pretrained(base)
    merge(base, made_elsewhere, tmp_path / "merged")
    with unwarned_of_tied_embeddings():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made_elsewhere).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(said(merged), said(adapted), atol=1e-4, rtol=0)
    assert (said(merged) - said(AutoModelForCausalLM.from_pretrained(base).eval())).abs().mean() > 1e-2
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_an_exported_policy_is_a_directory_that_peft_loads(made_elsewhere, tmp_path):
    manifest = imported(made_elsewhere, tmp_path)
    directory, _ = checked_adapter(tmp_path, manifest, max_rank=8)
    archive = archive_of(manifest.as_candidate(), directory, str(BASE.directory))
    written = tmp_path / "policy.tar"
    written.write_bytes(b"".join(archive.chunks()))
    assert written.stat().st_size == archive.num_bytes
    unpack(written, tmp_path / "out")
    torch.testing.assert_close(said(worn(tmp_path / "out")), said(worn(made_elsewhere)))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        BASE.directory
    )
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nbase_model: ")
