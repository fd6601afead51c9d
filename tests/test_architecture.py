"""The rules of the code base, read from its syntax trees; every rule is shown to catch a planted violation."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffinv.core import registry
from tests.cases import registered

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_FUNCTION_LINES = 400, 60

# From the bottom up; names on one line do not import each other.
LAYERS = (
    ("core",),
    ("operators", "schedules"),
    ("noise", "spectral"),
    ("likelihood", "priors"),
    ("reconstructors",),
    ("guidance", "losses"),
    ("posterior",),
    ("samplers", "uncertainty", "unmixing"),
    ("data",),
    ("training", "report"),
    ("engine",),
    ("config",),
    ("sections",),
    ("assembly",),
    ("commands",),
    ("cli", "__init__"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "astropy": "data/fits.py",
    "galsim": "data/simulate.py",
    "diffusers": "priors/hub.py",
    "accelerate": "training/loop.py",
    "matplotlib": "report/figures.py",
    "PIL": "report/figures.py",
    "yaml": "config.py",
    "pydantic": "config.py",
    "jax": "unmixing/bayes.py",
    "numpyro": "unmixing/bayes.py",
    "parsl": "engine/sites.py",
    "h5py": "data/hdf5.py",
    "zarr": "data/zarrs.py",
    "pyarrow": "data/parquet.py",
}
CASES = {"operator": "operators", "noise": "noise", "prior": "priors", "guidance": "guidance", "sampler": "samplers"}
CASES |= {"loss": "losses", "group": "groups"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial"}
TORCH_DRAWS |= {"_standard_gamma", "_sample_dirichlet"}
TENSOR_DRAWS = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
TENSOR_DRAWS |= {"multinomial", "bernoulli"}
NEVER = {"torch.manual_seed", "torch.seed", "torch.rand_like", "torch.randn_like", "torch.randint_like", "torch.set_rng_state"}
NUMPY_ALLOWED = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "BitGenerator"}
CODE_RUNNERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CODE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}

Rule = Callable[[str, str], list[str]]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imports(source: str) -> Iterator[str]:
    """Every imported module, and `module.name` for names imported from a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def part_of(path: str) -> str:
    """The layer's name of a file relative to the package: `core/rng.py` → core, `cli.py` → cli."""
    return path.split("/")[0].removesuffix(".py")


def layers(path: str, source: str) -> list[str]:
    own = part_of(path)
    if own not in RANK:
        return [f"{path}: {own} has no layer"]
    found = []
    for name in imports(source):
        if name.startswith("."):
            found.append(f"{path}: relative import {name}")
        parts = name.split(".")
        if parts[0] != "diffinv" or len(parts) < 2 or parts[1] == own or parts[1] not in RANK:
            continue
        if RANK[parts[1]] >= RANK[own]:
            found.append(f"{path}: {own} imports {name}")
    return found


def file_length(path: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{path}: {lines} lines"] if lines > MAX_LINES else []


def function_length(path: str, source: str) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = [(f.name, f.end_lineno - f.lineno + 1) for f in functions]
    return [f"{path}: {name} has {length} lines" for name, length in lengths if length > MAX_FUNCTION_LINES]


def heavy_imports(path: str, source: str) -> list[str]:
    names = {name.split(".")[0] for name in imports(source)}
    return [f"{path}: imports {name}, which belongs to {home}" for name, home in HEAVY.items() if name in names and path != home]


def global_randomness(path: str, source: str) -> list[str]:
    found = [f"{path}: imports {name}" for name in imports(source) if name == "random" or name.startswith("random.")]
    for call in calls(source):
        name = dotted(call.func)
        last = call.func.attr if isinstance(call.func, ast.Attribute) else name
        has_generator = any(k.arg == "generator" for k in call.keywords)
        module, _, function = name.rpartition(".")
        if name in NEVER or name.startswith(("torch.random.", "torch.cuda.manual_seed")):
            found.append(f"{path}:{call.lineno} {name}")
        elif module == "torch" and function in TORCH_DRAWS and not has_generator:
            found.append(f"{path}:{call.lineno} {name} without generator")
        elif isinstance(call.func, ast.Attribute) and last in TENSOR_DRAWS and module != "torch" and not has_generator:
            found.append(f"{path}:{call.lineno} .{last} without generator")
        elif module in ("np.random", "numpy.random") and (function not in NUMPY_ALLOWED or not (call.args or call.keywords)):
            found.append(f"{path}:{call.lineno} {name}")
    return found


def code_runners(path: str, source: str) -> list[str]:
    found = [f"{path}: imports {name}" for name in imports(source) if name.split(".")[0] in CODE_RUNNERS]
    for call in calls(source):
        allows = any(
            k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and not k.value.value) for k in call.keywords
        )
        if dotted(call.func) in CODE_CALLS or allows:
            found.append(f"{path}:{call.lineno} {dotted(call.func)}")
    return found


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (layers, file_length, function_length, heavy_imports, global_randomness, code_runners)
}
PLANTED = {
    "layers": [
        ("core/x.py", "from diffinv.operators.base import Operator\n"),
        ("samplers/x.py", "def f():\n    import diffinv.engine.run\n"),
        ("noise/x.py", "from .base import Noise\n"),
        ("report/x.py", "from diffinv import cli\n"),
        ("priors/x.py", "from diffinv.likelihood import Flat\n"),
        ("utils/x.py", "x = 1\n"),
    ],
    "file_length": [("core/x.py", "x = 1\n" * (MAX_LINES + 1))],
    "function_length": [("core/x.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)],
    "heavy_imports": [
        ("data/catalog.py", "import astropy.table\n"),
        ("engine/x.py", "def f():\n    from matplotlib import pyplot\n"),
    ],
    "global_randomness": [
        ("core/x.py", "import torch\ntorch.manual_seed(0)\n"),
        ("core/x.py", "import torch\nx = torch.randn(3)\n"),
        ("core/x.py", "import torch\nx = torch.randn_like(y)\n"),
        ("core/x.py", "y = x.new_empty(3).normal_()\n"),
        ("core/x.py", "import numpy as np\nnp.random.seed(1)\n"),
        ("core/x.py", "import numpy as np\nx = np.random.default_rng()\n"),
        ("core/x.py", "import random\n"),
    ],
    "code_runners": [
        ("core/x.py", "import torch\nx = torch.load('f')\n"),
        ("core/x.py", "from pickle import loads\n"),
        ("core/x.py", "import numpy as np\nx = np.load('f', allow_pickle=True)\n"),
        ("core/x.py", "x = eval('1')\n"),
    ],
}
INNOCENT = """
import numpy as np, torch
from diffinv.core.rng import Rng
def f(rng, generator, like):
    np.random.default_rng(3).normal()
    np.load("f", allow_pickle=False)
    return torch.poisson(like, generator=generator) + rng.normal(like)
"""


def package_files() -> dict[str, str]:
    root = ROOT / "diffinv"
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sorted(root.rglob("*.py"))}


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps_the_rule(rule: str) -> None:
    files = package_files()
    assert len(files) > 30
    assert not [problem for path, source in files.items() for problem in RULES[rule](path, source)]


@pytest.mark.parametrize(("rule", "path", "source"), [(r, p, s) for r, planted in PLANTED.items() for p, s in planted])
def test_rule_catches_a_planted_violation(rule: str, path: str, source: str) -> None:
    assert RULES[rule](path, source)


@pytest.mark.parametrize("rule", RULES)
def test_rule_passes_innocent_code(rule: str) -> None:
    assert not RULES[rule]("samplers/x.py", INNOCENT)
    assert set(PLANTED) == set(RULES)


def test_tests_and_scripts_are_short_files() -> None:
    paths = [*(ROOT / "tests").rglob("*.py"), *(p for p in (ROOT / "scripts").iterdir() if p.is_file())]
    assert not [problem for p in paths for problem in file_length(p.name, p.read_text(encoding="utf-8"))]


def missing_cases(kind: str, names: list[str]) -> list[str]:
    cases = importlib.import_module(f"tests.cases.{CASES[kind]}").CASES
    return sorted(set(names) - set(cases))


@pytest.mark.parametrize("kind", CASES)
def test_every_registered_name_has_a_case(kind: str) -> None:
    names = registered(kind, "diffinv")
    assert names
    assert not missing_cases(kind, names)


def test_a_name_without_a_case_is_found() -> None:
    assert missing_cases("sampler", [*registered("sampler", "diffinv"), "planted"]) == ["planted"]


def test_every_registered_kind_is_known_here() -> None:
    registered("operator", "diffinv")
    without_cases = {"schedule", "border", "filter", "solver", "slope", "hiding", "covariance", "design", "use"}
    assert set(registry.kinds()) <= set(CASES) | without_cases
