"""The house rules that a machine can keep: directions, sizes, what must not exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("bon_algos", "archive", "service", "worker", "bonsai", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CODE = [path for path in SOURCES if path.read_text().strip()]

FORBIDDEN_CALLS = {
    "torch.load": "pickle: weights are safetensors",
    "pickle.loads": "pickle",
    "pickle.load": "pickle",
    "yaml.load": "executes tags",
    "eval": "executes text",
    "exec": "executes text",
    "os.system": "a shell",
}
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def loaded_modules(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after one statement."""
    code = f"{statement}; import sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
def test_the_gateway_loads_no_training_library_and_no_worker():
    assert loaded_modules("import service.app") & {"torch", "transformers", "peft", "vllm", "worker"} == set()


def test_the_celery_parent_loads_no_torch():
    """CUDA must not be initialised before a fork, and an idle worker should be small."""
    assert loaded_modules("import worker.tasks") & {"torch", "transformers", "peft", "vllm", "service"} == set()


def test_the_records_load_nothing_but_pydantic():
    heavy = {"torch", "numpy", "redis", "celery", "aiohttp", "fastapi", "jinja2", "tokenizers"}
    assert loaded_modules("import bon_algos.contracts") & heavy == set()


@pytest.mark.slow
def test_the_algorithms_need_nothing_that_service_or_worker_bring():
    """The extra `algorithms` is torch and transformers; what those bring is theirs."""
    modules = ", ".join(f"bon_algos.{path.stem}" for path in sorted((ROOT / "bon_algos").glob("[a-z]*.py")))
    needless = {"redis", "celery", "aiohttp", "fastapi", "peft", "pydantic_settings", "uuid_utils", "trl"}
    assert loaded_modules(f"import {modules}") & (needless | {"service", "worker", "bonsai"}) == set()


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_every_module_says_what_it_owns(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)} has no head docstring"


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_no_file_over_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_no_function_over_40_lines(path):
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {f.name: code_lines(f) for f in functions if code_lines(f) > 40} == {}


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_nothing_executes_what_it_reads(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            found += [
                keyword.arg
                for keyword in node.keywords
                if keyword.arg in FORBIDDEN_KEYWORDS
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is FORBIDDEN_KEYWORDS[keyword.arg]
            ]
    assert found == []
