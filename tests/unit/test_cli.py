"""The command line answers every mistake with one line and an exit code, and asks for help without loading anything heavy."""

from __future__ import annotations

import errno
import importlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import diffinv
from diffinv.cli import main
from diffinv.engine.run import Run
from tests.small import FAST, write_observation, write_prior

HEAVY = (
    "torch",
    "diffusers",
    "accelerate",
    "jax",
    "numpyro",
    "astropy",
    "scipy",
    "matplotlib",
    "galsim",
    "pydantic",
    "yaml",
    "numpy",
)
LIST_HEAVY = f"print('LOADED', [m for m in {HEAVY} if m in sys.modules])"


def loaded(code: str) -> str:
    """What a fresh interpreter has loaded after `code`."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", [[], ["sample"], ["train"], ["simulate"], ["inspect"], ["report"], ["status"], ["merge"]])
def test_help_loads_no_heavy_library(command: list[str]) -> None:
    arguments = [*command, "--help"]
    code = (
        f"import sys, diffinv.cli\ntry: diffinv.cli.main({arguments!r})\nexcept SystemExit as e: assert e.code == 0\n{LIST_HEAVY}"
    )
    assert loaded(code) == "LOADED []"


def test_the_check_of_loaded_libraries_sees_one() -> None:
    assert loaded(f"import sys, numpy\n{LIST_HEAVY}") == "LOADED ['numpy']"


def test_import_of_the_package_loads_nothing_and_its_names_come_when_used() -> None:
    assert loaded(f"import sys, diffinv\n{LIST_HEAVY}") == "LOADED []"
    for name in diffinv.__all__:
        assert getattr(diffinv, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        diffinv.nothing  # noqa: B018
    assert set(dir(diffinv)) == set(diffinv.__all__)


@pytest.mark.parametrize("command", [["sample", "x.fits"], ["train"]])
def test_a_bad_configuration_is_found_before_torch_is_loaded(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sampler: {n_samples: 3}\n")
    arguments = [*command, "--out", str(tmp_path / "o"), "--config", str(tmp_path / "run.yaml")]
    code = f"import sys, diffinv.cli\nassert diffinv.cli.main({arguments!r}) == 2\nprint('torch' in sys.modules)"
    assert loaded(code) == "False"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str]]:
    """Exit code and lines of stderr."""
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    return write_prior(folder / "tiny.safetensors"), write_observation(folder / "galaxy.fits")


def test_version_and_usage() -> None:
    for arguments, expected in ((["--version"], 0), (["nonsense"], 2), ([], 2), (["sample"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == expected


def test_entry_point_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "diffinv", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"diffinv {diffinv.__version__}"


WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
from diffinv.cli import main
main(["unmix", "nothing.fits", "--config", "configs/unmix.yaml", "--out", "nowhere"])
"""


def test_threads_that_wait_sleep_soon_unless_the_user_chose_otherwise() -> None:
    """OpenMP reads it when torch is loaded."""
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for own, seen in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        found = subprocess.run([sys.executable, "-c", WATCH], env=plain | own, capture_output=True, text=True, timeout=60)
        assert found.stdout == f"{seen}\n", found.stderr


def test_configuration_errors_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sampler:\n  steps: 2\n  n_sample: 3\ndevice: 7\n")
    code, lines = run(capsys, "sample", "x.fits", "--out", tmp_path / "o", "--config", path, "--seed", "-1")
    assert code == 2
    assert f"diffinv: {path}:3 sampler.n_sample: unknown key (did you mean samples?)" in lines
    assert any(line.startswith(f"diffinv: {path}:4 device: expected") for line in lines)
    assert any(line.startswith("diffinv: --seed: expected") for line in lines)
    assert not (tmp_path / "o").exists()


def test_bfloat16_is_refused_where_the_processor_lacks_it(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "sample",
        files[1],
        "--out",
        tmp_path / "o",
        "--prior",
        files[0],
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        *FAST,
    )
    monkeypatch.setattr("diffinv.engine.devices.has_bfloat16", lambda: False)
    code, lines = run(capsys, *arguments)
    assert code == 2 and len(lines) == 1 and "use float32" in lines[0]
    monkeypatch.setattr("diffinv.engine.devices.has_bfloat16", lambda: True)
    assert run(capsys, *arguments)[0] == 0


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def reshaped(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"widths\\": [8, 16]', b'\\"widths\\": [8, 24]'))


@pytest.mark.parametrize(
    ("damage", "name", "expected"),
    [
        (pickled, "weights.pt", "must be a .safetensors file"),
        (pickled, "weights.safetensors", "not a readable safetensors file"),
        (truncated, "weights.safetensors", "not a readable safetensors file"),
        (reshaped, "weights.safetensors", "do not fit the architecture"),
        (Path.unlink, "weights.safetensors", "no such file"),
    ],
)
def test_unusable_weights_are_one_line_before_the_job_starts(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, name: str, expected: str
) -> None:
    weights = tmp_path / name
    weights.write_bytes(files[0].read_bytes())
    damage(weights)
    code, lines = run(capsys, "sample", files[1], "--out", tmp_path / "o", "--prior", weights)
    assert (code, len(lines)) == (2, 1)
    assert expected in lines[0]
    assert not list((tmp_path / "o" / "products").glob("*/*"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (("--set", "sampler.name=huen"), "--set sampler.name: sampler 'huen': unknown (did you mean heun?)"),
        (("--set", "sampler.guidance.name=dps"), "--set sampler.guidance.name: guidance 'dps'"),
        (("--set", "steps"), "expected key=value"),
        (("--set", "input.psf=none.fits"), "none.fits: cannot be read"),
        (("--device", "cuda:77"), "device"),
    ],
)
def test_unusable_choices_are_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], expected: str
) -> None:
    code, lines = run(capsys, "sample", files[1], "--out", tmp_path, "--prior", files[0], *extra)
    assert (code, len(lines)) == (2, 1)
    assert expected in lines[0]


@pytest.mark.parametrize("content", ["", "name,path\na,b\n", "object_id,path\na,x.fits\na,y.fits\n", "object_id,path\n,x.fits\n"])
def test_catalogues_without_columns_names_or_with_doubles_are_refused(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    catalogue = tmp_path / "list.csv"
    catalogue.write_text(content)
    code, lines = run(capsys, "sample", catalogue, "--out", tmp_path / "o", "--prior", files[0])
    if content == "":
        assert code == 0
        assert lines == ["diffinv: 0 products (0 were already there), 0 quarantined"]
    else:
        assert (code, len(lines)) == (2, 1)
        assert str(catalogue) in lines[0]


def test_a_missing_input_is_one_line(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "sample", tmp_path / "none", "--out", tmp_path / "o", "--prior", files[0])
    assert (code, len(lines)) == (2, 1)
    assert "no such file or directory" in lines[0]


def test_an_output_that_cannot_be_written_is_74_before_the_prior_is_loaded(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, lines = run(capsys, "sample", files[1], "--out", tmp_path / "file" / "o", "--prior", "none-such")
    assert (code, len(lines)) == (74, 1)


def test_a_full_disk_is_74_and_leaves_no_partial_product(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "product.fits")

    monkeypatch.setattr("diffinv.data.atomic.os.replace", full)
    code, lines = run(capsys, "sample", files[1], "--out", tmp_path, "--prior", files[0], *FAST)
    assert code == 74
    assert lines == ["diffinv: product.fits: No space left on device; no partial product was left."]
    assert not [p for p in (tmp_path / "products").rglob("*") if p.is_file()]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_say_how_to_go_on(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    expected: int,
) -> None:
    monkeypatch.setattr(Run, "read", lambda *arguments: os.kill(os.getpid(), number))
    before, inherited = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, lines = run(capsys, "sample", files[1], "--out", tmp_path, "--prior", files[0])
    finally:
        signal.signal(signal.SIGINT, inherited)  # a shell's background job ignores it
    assert code == expected
    assert lines == ["diffinv: interrupted; finished products are kept, the same command does the rest."]
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "quarantine").exists()


def test_inspect_says_what_would_be_read_and_what_it_costs(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(files[1]), "--prior", str(files[0])]) == 0
    text = capsys.readouterr().out
    for expected in (
        "band       i",
        "8 × 8 pixels of 0.2″",
        "unit nJy",
        "FWHM 0.6",
        "median std 1 ",
        "bad      0.00%",
        "16 × 16",
        "time ",
        "memory ",
    ):
        assert expected in text


def test_inspect_refuses_a_broken_file_in_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "page.fits"
    broken.write_text("<html>not found</html>")
    code, lines = run(capsys, "inspect", broken, "--prior", files[0])
    assert (code, len(lines)) == (2, 1)
    assert str(broken) in lines[0]


def test_every_public_name_has_its_home() -> None:
    for name, home in diffinv._HOMES.items():
        assert getattr(importlib.import_module(home), name) is getattr(diffinv, name)
