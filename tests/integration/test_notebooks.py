"""The notebooks and the README's Python run, on tiny settings, and notebooks are stored without outputs.

Cells run in order in one fresh interpreter in which every warning is an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffinv.priors.store import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAYS = {  # what each prints
    "first_posterior": "intervals hold the truth",
    "which_sampler": "ancestral: std ratio",
    "learning_from_measurements": "refused: Shifts adds nothing",
    "prior_from_noisy_cutouts": "intervals hold the truth",
    "hallucination": "stripes: S/N in the data",
    "muse_velocity": "factorised: nearest spectrum",
    "remnant_maps": "kT: median error",
}
TINY = {
    "DIFFINV_NOTEBOOK_DRAWS": "2",
    "DIFFINV_NOTEBOOK_STEPS": "4",
    "DIFFINV_NOTEBOOK_IMAGES": "96",
    "DIFFINV_NOTEBOOK_PIXELS": "6",
}
DATA = Path(os.environ.get("DIFFINV_DATA", ROOT.parent / "shared" / "data")).resolve()


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run(parts: list[tuple[str, str]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run (name, source) parts one after the other in one namespace; a traceback names the part."""
    script = folder / "script.py"
    program = "import sys\nnamespace = {'__name__': '__main__'}\n"
    program += "".join(f"exec(compile({source!r}, {name!r}, 'exec'), namespace)\n" for name, source in parts)
    script.write_text(program, encoding="utf-8")
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "DIFFINV_DATA": str(DATA)}
    environment = {**os.environ, **threads, **TINY, "MPLBACKEND": "Agg", "TMPDIR": str(folder)}
    # plt.show() of a backend without a window warns by design
    flags = ["-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive:UserWarning"]
    flags += ["-W", "ignore:`torch.jit.script` is deprecated:DeprecationWarning"]
    command = [sys.executable, *flags, str(script)]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False, encoding="utf-8"
    )


def need_prior() -> None:
    if not (SHIPPED / "galaxies-64.safetensors").is_file():
        pytest.skip("needs the shipped weights diffinv/weights/galaxies-64.safetensors")


def readme_python() -> list[str]:
    """The README's Python; its YAML and shell as programs that write it (its first line is the name) and run it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [_program(kind, block) for kind, block in re.findall(r"```(python|yaml|sh)\n(.*?)```", text, re.DOTALL)]


def _program(kind: str, block: str) -> str:
    if kind == "yaml":
        name = block.partition("\n")[0].removeprefix("# ")
        return f"from pathlib import Path\nPath({name!r}).write_text({block!r}, encoding='utf-8')\n"
    if kind == "sh":
        commands = [line.removeprefix("diffinv ").split() for line in block.splitlines()]
        return "import diffinv.cli\n" + "".join(f"assert diffinv.cli.main({command}) == 0\n" for command in commands)
    return block


def test_there_is_something_to_run() -> None:
    assert NOTEBOOKS
    assert readme_python()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_without_outputs_and_as_plain_python(path: Path) -> None:
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "DIFFINV_DATA" in text and not DATA.is_dir():
        pytest.skip("needs real data: set DIFFINV_DATA or put shared/data beside the checkout")
    if "DIFFINV_DATA" not in text:
        need_prior()
    if "DIFFINV_DATA" not in text and importlib.util.find_spec("galsim") is None:
        pytest.skip("the notebook's mock galaxy needs GalSim: install diffinv[simulate]")
    done = run([(cell["id"], "".join(cell["source"])) for cell in cells(path, "code")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout


def test_a_cell_that_fails_or_warns_is_noticed(tmp_path: Path) -> None:
    assert run([("first", "a = 1"), ("second", "assert a == 1")], tmp_path).returncode == 0
    failed = run([("first", "a = 1"), ("second", "assert a == 2")], tmp_path)
    assert failed.returncode != 0 and '"second"' in failed.stderr
    assert run([("only", "import warnings\nwarnings.warn('careful')")], tmp_path).returncode != 0


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    need_prior()
    blocks = tiny(readme_python())
    done = run([(f"README block {k}", source) for k, source in enumerate(blocks)], tmp_path)
    assert done.returncode == 0, done.stderr


def tiny(blocks: list[str]) -> list[str]:
    """The same code with the settings of a test."""
    for large, small in (
        (r"draws=32", "draws=19, method=diffinv.Method(steps=2)"),
        (r"steps=500, batch_size=32", "steps=2, batch_size=4"),
        (r"\b2000\b", "40"),
        (r"steps: 1000", "steps: 2"),
    ):
        changed = [re.sub(large, small, source) for source in blocks]
        assert changed != blocks
        blocks = changed
    return blocks


def test_every_file_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
