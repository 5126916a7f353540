"""Fills .venv from the lock files, and does nothing when it is already full.

Run by `make setup` with any Python from 3.11 on; uses the standard library alone. It owns the choice
between the CPU and the CUDA set and the way a CPU build of torch is found. It does not choose versions:
those stand in pyproject.toml (torch) and in the lock files (everything else), which `make lock` writes.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
LOCKED = ("--no-deps", "--require-hashes")
DEVICES = ("cpu", "cuda")

# Named as the registry names them. On a CPU each is dead weight of gigabytes, or breaks an import: a CUDA
# build of torchvision next to a CPU build of torch makes `import transformers` fail.
NOT_ON_A_CPU = re.compile(r"(nvidia|cuda)-.*|(pytorch-)?triton|torchvision|torchaudio|torchcodec")


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver answers and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def torch_version(root: Path) -> str:
    """The one version of torch that pyproject.toml asks for."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    algorithms: list[str] = project["optional-dependencies"]["algorithms"]
    pins = {name: version for name, _, version in (line.partition("==") for line in algorithms)}
    return pins["torch"]


def digest(root: Path, device: str) -> str:
    """Names everything that decides what .venv holds."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    sections = [project["build-system"], project["project"], project["tool"]["setuptools"]]
    parts = [
        (root / "requirements" / f"{device}.txt").read_bytes(),
        (root / "requirements" / "install.py").read_bytes(),
        json.dumps(sections, sort_keys=True).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_cpu_build_offered(listing: str, version: str) -> bool:
    """Whether `pip index versions torch` listed the CPU build of a version."""
    return f"{version}+cpu" in re.split(r"[\s,]+", listing)


def forbidden_on_a_cpu(names: list[str]) -> list[str]:
    """Those packages that have no place in the CPU set."""
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    return sorted(name for name in normal if NOT_ON_A_CPU.fullmatch(name))


class Environment:
    """The .venv of one checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / ".venv"
        self.python = self.path / "bin" / "python"
        self.stamp = self.path / ".installed"
        """Lines: device, checkout, digest of the last complete set-up. Absent while one runs or after it failed."""

    def is_current(self, device: str) -> bool:
        return self.python.exists() and self._stamped() == [*self._made_for(device), digest(self.root, device)]

    def fill(self, device: str) -> None:
        self._create(device)
        self.stamp.unlink(missing_ok=True)
        if device == "cpu":
            # Before, not after: what follows can add none, for it installs what is named and no dependency.
            self._refuse_cuda_packages()
        version = torch_version(self.root)
        say(f"torch {version} for {device}")
        self._install_cpu_torch(version) if device == "cpu" else self._install_cuda_torch(version)
        say(f"everything in requirements/{device}.txt; this takes minutes the first time")
        self._pip("install", *LOCKED, "-r", f"requirements/{device}.txt")
        self._pip("install", "--no-deps", "--no-build-isolation", "-e", ".")
        self.stamp.write_text("\n".join([*self._made_for(device), digest(self.root, device)]))

    def _made_for(self, device: str) -> list[str]:
        return [device, str(self.root)]

    def _stamped(self) -> list[str]:
        return self.stamp.read_text().splitlines() if self.stamp.exists() else []

    def _create(self, device: str) -> None:
        if self.path.is_symlink():
            raise SetupError(".venv is a link, and set-up would empty what it points to; remove the link")
        # The scripts of a virtual environment name its path, so one that was moved or copied is of no use.
        made_for_another = self._stamped()[:2] not in ([], self._made_for(device))
        if not made_for_another and self.python.exists() and self._output(*PIP, "--version"):
            return
        say(f"a new .venv with Python {sys.version.split()[0]}")
        create = [sys.executable, "-m", "venv", "--clear", str(self.path)]
        if subprocess.run(create, check=False).returncode != 0:
            raise SetupError("`python -m venv` failed; on Debian and Ubuntu it needs the package python3-venv")

    def _install_cpu_torch(self, version: str) -> None:
        listing = self._output(*PIP, "index", "versions", "torch")
        if is_cpu_build_offered(listing, version):
            self._pip("install", "--no-deps", f"torch=={version}+cpu")
            return
        say(f"pip offers no CPU build of torch {version}; asking uv for it")
        self._pip("install", *LOCKED, "-r", "requirements/uv.txt")
        uv = (str(self.path / "bin" / "uv"), "pip", "install", "--python", str(self.python), "--no-deps")
        if not self._run(*uv, "--torch-backend=cpu", f"torch=={version}"):
            raise SetupError(
                f"neither pip nor uv found a CPU build of torch {version}. Where the network keeps uv from "
                f"it, put a wheel torch-{version}+cpu for this Python into a directory, name the directory "
                "in PIP_FIND_LINKS and run make again. The CUDA build is not taken instead: it brings "
                "gigabytes that this machine cannot use."
            )

    def _install_cuda_torch(self, version: str) -> None:
        self._pip("install", "--no-deps", f"torch=={version},!={version}+cpu")

    def _refuse_cuda_packages(self) -> None:
        site_packages = [str(path) for path in self.path.glob("lib/python*/site-packages")]
        found = forbidden_on_a_cpu([package.name for package in distributions(path=site_packages)])
        if found:
            raise SetupError(f".venv holds {', '.join(found)}, which the CPU set must not; remove .venv")

    def _pip(self, *arguments: str) -> None:
        if not self._run(str(self.python), *PIP, "-qq", *arguments):
            raise SetupError(f"pip {' '.join(arguments)} failed; its message is above")

    def _run(self, *command: str) -> bool:
        return subprocess.run(command, cwd=self.root, check=False).returncode == 0

    def _output(self, *arguments: str) -> str:
        asked = subprocess.run([str(self.python), *arguments], capture_output=True, text=True, check=False)
        return asked.stdout


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def main(asked: str) -> None:
    device = asked if asked != "auto" else "cuda" if has_nvidia_gpu() else "cpu"
    if device not in DEVICES or sys.platform != "linux":
        raise SetupError(f"DEVICE is auto, cpu or cuda, on Linux; not {device} on {sys.platform}")
    environment = Environment(ROOT)
    # Two makes at once in one checkout take turns; the second then finds nothing left to do.
    turn = os.open(ROOT / "requirements", os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    if not environment.is_current(device):
        environment.fill(device)
        say("done")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except SetupError as error:
        sys.exit(f"setup: {error}")
