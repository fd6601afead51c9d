"""An output directory holds one run, and nothing outside of it is touched."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from diffinv.cli import main
from diffinv.data.fits import Plane, Table, encode_fits
from diffinv.data.inputs import file_digest
from diffinv.engine.draws import INNER
from diffinv.engine.run import Run, prepare
from tests.small import FAST, blob, write_observation, write_prior


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "tiny.safetensors")


def sample(source: Path, out: Path, prior: Path, *extra: str) -> int:
    return main(["sample", str(source), "--out", str(out), "--prior", str(prior), *FAST, *extra])


def write_psf(path: Path, fwhm: float) -> Path:
    path.write_bytes(encode_fits([Plane("PRIMARY", blob(15, fwhm).astype(np.float32), {"PSFNORM": 1.0})]))
    return path


@pytest.mark.parametrize("target", ["0.1", "0"])
def test_a_sharper_target_is_refused_before_anything_is_sampled(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    source, extra = write_observation(tmp_path / "a.fits"), ("--set", f"output.target_psf={target}")
    for arguments in ((), ("--dry-run",)):
        assert sample(source, tmp_path / "out", prior, *extra, *arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("diffinv: output.target_psf: ") and "is sharper" in captured.err
    assert not (tmp_path / "out" / "quarantine").exists()
    assert main(["inspect", str(source), "--prior", str(prior), *extra]) == 2
    assert "is sharper" in capsys.readouterr().err


def test_run_json_comes_with_the_first_product(tmp_path: Path, prior: Path) -> None:
    source, out = write_observation(tmp_path / "a.fits"), tmp_path / "out"
    (tmp_path / "broken.fits").write_bytes(b"")
    assert sample(source, out, prior, "--dry-run") == 0
    assert sample(tmp_path / "broken.fits", out, prior) == 2
    assert not (out / "run.json").exists()
    assert sample(source, out, prior, "--seed", "5") == 0
    before = (out / "run.json").read_bytes()
    assert sample(source, out, prior, "--seed", "6", "--new-run", "--dry-run") == 0
    assert (out / "run.json").read_bytes() == before


def test_a_run_that_another_overtook_leaves_its_record_alone(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs may start in an empty directory: the one whose product comes second finds the record of the first."""
    source, out, write = write_observation(tmp_path / "a.fits"), tmp_path / "out", Run.write_record
    assert sample(source, tmp_path / "first", prior, "--seed", "5") == 0
    record = (tmp_path / "first" / "run.json").read_bytes()

    def overtaken(run: Run) -> None:
        out.mkdir(exist_ok=True)
        (out / "run.json").write_bytes(record)
        write(run)

    monkeypatch.setattr(Run, "write_record", overtaken)
    assert sample(source, out, prior, "--seed", "6") == 2
    assert "holds another run" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == record
    assert sample(source, out, prior, "--seed", "6", "--new-run") == 0
    assert (out / "run.json").read_bytes() != record


def test_run_json_holds_the_resolved_sampler_and_names_do_not_matter(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_observation(tmp_path / "a.fits"), tmp_path / "out"
    assert sample(source, out, prior) == 0
    method = json.loads((out / "run.json").read_text())["method"]
    assert method["sampler"].startswith("StochasticMultistep(")
    assert method["steps"] == 4
    assert f"Gmres(iterations=2, tol=0.001, inner={INNER})" in method["guidance"]
    same = ("--set", "sampler.guidance.name=moment_matching", "--set", "sampler.guidance.tol=0.001")
    assert sample(source, out, prior, *same) == 0
    assert len(list((out / "products").glob("*/*.fits"))) == 1
    capsys.readouterr()
    assert sample(source, out, prior, "--set", "sampler.guidance.name=moment_matching_cg") == 2
    assert "method.guidance" in capsys.readouterr().err


def test_another_psf_in_the_same_file_is_another_run(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_observation(tmp_path / "a.fits"), tmp_path / "out"
    extra = ("--set", f"input.psf={write_psf(tmp_path / 'psf.fits', 3.0)}")
    assert sample(source, out, prior, *extra) == 0
    write_psf(tmp_path / "psf.fits", 3.5)
    capsys.readouterr()
    assert sample(source, out, prior, *extra) == 2
    assert "files_sha256.psf" in capsys.readouterr().err


def test_a_pipe_is_set_aside_and_not_waited_for(tmp_path: Path, prior: Path) -> None:
    os.mkfifo(tmp_path / "pipe.fits")
    write_observation(tmp_path / "a.fits")
    (tmp_path / "list.csv").write_text("object_id,path\npipe,pipe.fits\nfolder,.\na,a.fits\n")

    def late(*arguments: object) -> None:
        raise AssertionError("waits for the pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        assert sample(tmp_path / "list.csv", tmp_path / "out", prior) == 4
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    records = {p.stem: json.loads(p.read_text())["reason"] for p in (tmp_path / "out" / "quarantine").iterdir()}
    assert set(records) == {"pipe", "folder"}
    assert all("a directory, a device or a pipe" in reason for reason in records.values())


def test_inputs_are_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.fits"
    source.write_bytes(b"abc")

    def whole(path: Path) -> bytes:
        raise AssertionError(f"{path} was read at once")

    monkeypatch.setattr(Path, "read_bytes", whole)
    assert file_digest(source) == hashlib.sha256(b"abc").hexdigest()


def test_a_file_that_is_all_suffix_does_not_stop_the_run(tmp_path: Path, prior: Path) -> None:
    write_observation(tmp_path / "in" / "a.fits")
    (tmp_path / "in" / ".fits").write_bytes(b"")
    assert sample(tmp_path / "in", tmp_path / "out", prior) == 4
    assert [p.name for p in (tmp_path / "out" / "quarantine").iterdir()] == ["%2Efits.json"]
    assert len(list((tmp_path / "out" / "products").glob("*/*.fits"))) == 1


@pytest.mark.parametrize("name", ["products", "quarantine"])
def test_a_link_that_leads_out_of_the_output_is_refused(
    tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / name).symlink_to(outside)
    broken = tmp_path / "a.fits"
    broken.write_bytes(b"")
    assert sample(broken, out, prior) == 2
    assert "a symbolic link leads out" in capsys.readouterr().err
    assert not list(outside.iterdir())


def test_the_probe_follows_no_link_and_leaves_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out" / "products").mkdir(parents=True)
    (tmp_path / "out" / "products" / ".probe").symlink_to(victim)
    prepare(tmp_path / "out")
    assert victim.read_text() == "precious"
    assert [p.name for p in (tmp_path / "out" / "products").iterdir()] == [".probe"]


def test_simulate_without_galsim_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "mocks.yaml"
    config.write_text("simulate: {survey: hsc_wide, bands: [i]}\n")
    for module in ("diffinv.engine.mocks", "diffinv.data.simulate"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "galsim", None)
    assert main(["simulate", "--config", str(config), "--out", str(tmp_path / "in")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "diffinv[simulate]" in line


@pytest.mark.parametrize("length", [None, 0, 2000, 5760, 99999])
def test_damaged_cosmos_tables_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int | None) -> None:
    config = tmp_path / "mocks.yaml"
    config.write_text(f"simulate: {{survey: hsc_wide, bands: [i], cosmos: {tmp_path}}}\n")
    if length is not None:  # 99999: whole files, but a table without the columns
        whole = encode_fits(
            [
                Plane("PRIMARY", None, {}),
                Table("FITS", {"IDENT": np.arange(3)}, {}),
                Plane("SCI", np.ones((64, 64), np.float32), {}),
            ]
        )
        for name in ("parametric_fits", "hst_f814w_stamps", "hst_f814w_psfs"):
            (tmp_path / f"{name}.fits").write_bytes(whole[:length])
    assert main(["simulate", "--config", str(config), "--out", str(tmp_path / "in")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffinv: simulate.cosmos: {tmp_path} has no usable tables")
