"""The configuration names every mistake with its place, at once, and builds nothing from a file that it has not understood."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parsl.providers import LocalProvider

from diffinv.assembly.job import build_design
from diffinv.assembly.losses import build_loss
from diffinv.assembly.sampling import input_options, read_site
from diffinv.assembly.trust import check_calibrate
from diffinv.config import Override, all_keys, load, parse_set
from diffinv.core.checks import ConfigError
from diffinv.data.layouts import InputOptions
from diffinv.engine.draws import Method
from diffinv.engine.learn import Levels
from diffinv.engine.methods import GUIDANCES, Choice, build_method
from diffinv.engine.mocks import SURVEYS, Mocks
from diffinv.schedules import LogNormal
from diffinv.sections.calibrate import CalibrateConfig
from diffinv.sections.prior import PriorConfig
from diffinv.sections.sample import SampleConfig, SimulateConfig
from diffinv.sections.train import DataSection, TrainConfig, TrainingSection
from diffinv.sections.unmix import UnmixConfig
from diffinv.training.augment import AsTheyAre
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import CleanImages
from tests.small import card

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))


def problems(tmp_path: Path, text: str | bytes, *sets: str) -> list[str]:
    """The lines of the error, without the folder."""
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(SampleConfig, path, [parse_set(item) for item in sets])
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_every_mistake_is_reported_at_once_with_its_line_and_nearest_key(tmp_path: Path) -> None:
    text = "sampler:\n  steps: -1\n  n_samples: 3\nprior: galaxies\nseed: 2\ninput:\n  pixel_scale: wide\ndevice: tpu\n"
    found = problems(tmp_path, text)
    assert "run.yaml:3 sampler.n_samples: unknown key (did you mean samples?)" in found
    assert "run.yaml:5 seed: unknown key (did you mean sampler.seed?)" in found
    starts = {line.partition(":")[0] + ":" + line.split(":")[1] for line in found}
    assert starts == {
        "run.yaml:2 sampler.steps",
        "run.yaml:3 sampler.n_samples",
        "run.yaml:4 prior",
        "run.yaml:5 seed",
        "run.yaml:7 input.pixel_scale",
        "run.yaml:8 device",
    }


def test_a_valid_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sampler: {steps: 7, samples: 12}\ninput: {bands: [g, y, 814], noise_std: 1e-3}\n")
    config = load(SampleConfig, path).config
    assert (config.sampler.steps, config.sampler.samples) == (7, 12)
    assert config.input.bands == ("g", "y", "814")
    assert config.input.noise_std == (1e-3,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sampler:\n  steps: 1\n  steps: 2\n", "run.yaml:3 sampler.steps: duplicate key (first on line 2)"),
        ("prior:\n  name: !!python/object/apply:os.system [ls]\n", "run.yaml:2 prior.name: tag"),
        ("sampler: {steps: !!int many}\n", "run.yaml:1 sampler.steps: 'many' is not of type int"),
        ("a: &a [*a]\n", "run.yaml:1 a"),
        ("base: &b {name: x}\nprior:\n  <<: *b\n", "run.yaml:3 prior: keys are plain names"),
        ("a: [1\nb: 2", "run.yaml:2 not valid YAML"),
        ("- 1\n", "run.yaml:1 expected `section:`"),
        ("[" * 5000, "run.yaml: is nested too deeply"),
        (b"\x00", "run.yaml: not valid YAML"),
        (b"\xff\xfe\xfd", "run.yaml"),
        ("#" * 300_000, "run.yaml: is larger than"),
    ],
)
def test_hostile_yaml_is_refused_with_its_place(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert problems(tmp_path, text)[0].startswith(expected)


def test_an_alias_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * 10)}]" for k in range(1, 12)]
    (line,) = problems(tmp_path, "\n".join(lines))
    assert "expands to more than" in line
    assert line.startswith("run.yaml:")


def test_a_missing_file_is_an_error_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(SampleConfig, tmp_path / "none.yaml")


def test_overrides_win_and_are_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sampler: {steps: 7}\n")
    loaded = load(
        SampleConfig, path, [parse_set("sampler.steps=8"), parse_set("input.bands=g,r"), Override("--seed", "sampler.seed", "5")]
    )
    assert loaded.config.sampler.steps == 8
    assert loaded.config.input.bands == ("g", "r")
    assert loaded.config.sampler.seed == 5
    assert loaded.where("sampler.steps") == "--set sampler.steps"
    found = problems(tmp_path, "device: cpu\n", "sampler.n_sample=3", "output.target_psf=-1", "input.psf=!!python/none x")
    assert "--set sampler.n_sample: unknown key (did you mean samples?)" in found
    assert any(line.startswith("--set output.target_psf: expected greater than or equal to 0, got -1") for line in found)
    assert any(line.startswith("--set input.psf: tag") for line in found)


@pytest.mark.parametrize("text", ["steps", "=3", " = 3"])
def test_a_set_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_set(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_in_configs_loads_and_means_something(path: Path) -> None:
    if "\ncalibrate:" in path.read_text():
        check_calibrate(load(CalibrateConfig, path).config)
        return
    if path.read_text().startswith("simulate:") or "\nsimulate:" in path.read_text():
        section = load(SimulateConfig, path).config.simulate
        assert Mocks(**{name: getattr(section, name) for name in type(section).model_fields}).count >= 1
        return
    if "\ncomponents:" in path.read_text():
        config = load(UnmixConfig, path).config
        assert all(set(c.box).isdisjoint(c.fixed) for c in config.components) and config.maps.rounds >= 1
        return
    if path.parent.name == "sites":
        site = read_site(path)
        assert (site.slurm is None) == isinstance(site.provider(), LocalProvider)
        return
    if path.parent.name == "prior":
        config = load(PriorConfig, path).config
        assert TrainingPlan(config.training.steps, config.training.batch_size, config.training.learning_rate).steps >= 1
        assert LogNormal(config.prior.levels.mean, config.prior.levels.std).std > 0
        return
    if "\ntraining:" in path.read_text():
        config = load(TrainConfig, path).config
        levels = Levels(1.0, 0.01, CleanImages(torch.zeros(1, 1, 8, 8), AsTheyAre()))
        assert build_loss(config.loss, levels, pairs=False) is not None
        assert build_design(config.network).build((1, 32, 32)) is not None
        assert TrainingPlan(config.training.steps, config.training.batch_size, config.training.learning_rate).steps >= 1
        return
    loaded = load(SampleConfig, path)
    sampler = loaded.config.sampler
    build_method(
        Choice(sampler.name, sampler.steps, sampler.guidance.name, sampler.guidance.iterations, sampler.guidance.tol), card()
    )


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 19


def test_every_survey_can_be_simulated_by_name() -> None:
    annotation = SimulateConfig.model_fields["simulate"].annotation.model_fields["survey"].annotation
    assert set(annotation.__args__) == set(SURVEYS)


def test_the_input_section_is_exactly_the_options_of_reading() -> None:
    keys = {key.removeprefix("input.") for key in all_keys(SampleConfig) if key.startswith("input.")}
    assert keys == {field.name for field in dataclasses.fields(InputOptions)}
    assert input_options(SampleConfig()) == InputOptions()


def test_psfs_are_one_file_or_one_a_band_and_are_written_as_they_were_given() -> None:
    for text, paths in (("input.psf=a.fits", ("a.fits",)), ("input.psf=[a.fits, b.fits]", ("a.fits", "b.fits"))):
        config = load(SampleConfig, None, [parse_set(text), parse_set("input.psf_position=[100, 20.5]")]).config
        options = input_options(config)
        assert options.psf == tuple(map(Path, paths))
        assert options.psf_position == (100, 20.5)
        written = config.model_dump(mode="json")["input"]["psf"]
        assert written == (paths[0] if len(paths) == 1 else list(paths))
    place = "two numbers, [x, y]"
    refused = {"psf=[]": "1 or more", "psf=[1]": "a path, got 1", "psf_position=[1, x]": "number, got 'x'"}
    for text, words in (refused | {"psf_position=[1]": place, "psf_position=[1, 2, 3]": place, "psf_position=5": place}).items():
        with pytest.raises(ConfigError, match=re.escape(f"input.{text.partition('=')[0]}: expected ") + ".*" + re.escape(words)):
            load(SampleConfig, None, [parse_set(f"input.{text}")])


def test_identity_holds_what_decides_the_numbers_and_nothing_else() -> None:
    plain = load(SampleConfig, None).config.identity()
    change = lambda text: load(SampleConfig, None, [parse_set(text)]).config.identity()
    assert change("device=cpu") == plain
    assert change("sampler.max_batch=3") == plain
    for text in ("sampler.seed=3", "dtype=bfloat16", "output.target_psf=0.3", "input.noise_std=2", "prior.name=other"):
        assert change(text) != plain


def test_without_a_choice_the_method_is_that_of_reconstruct() -> None:
    assert build_method(Choice(), card()) == Method()


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_guidance_of_the_configuration_can_be_built(name: str) -> None:
    assert build_method(Choice(guidance=name, iterations=3, tol=0.1), card()).guidance != Method().guidance


def test_every_sampler_is_known_by_name_in_a_fresh_interpreter() -> None:
    code = "from diffinv.engine.methods import Choice, build_method\n"
    code += "for name in ('euler', 'heun', 'ancestral'): print(type(build_method(Choice(name), None).sampler).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["Euler", "Heun", "Ancestral"]


def test_unknown_names_of_methods_are_refused_with_place_and_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sampler:\n  name: huen\n  guidance: {name: moment_match}\n")
    loaded = load(SampleConfig, path)
    with pytest.raises(ConfigError, match=r"run\.yaml:2 sampler\.name: .*did you mean heun\?"):
        build_method(Choice(sampler="huen"), card(), where=loaded.where)
    with pytest.raises(ConfigError, match=r"run\.yaml:3 sampler\.guidance\.name: .*did you mean moment_matching\?"):
        build_method(Choice(guidance="moment_match"), card(), where=loaded.where)


def train_problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, path)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


GOOD = {
    "data": "{path: a.npz}",
    "noise": "{kind: gaussian, std: 1}",
    "loss": "[{name: sure}]",
    "network": "{kind: backprojected}",
    "training": "{steps: 1, batch_size: 1, learning_rate: 1e-3}",
}


@pytest.mark.parametrize(
    ("section", "text", "expected"),
    [
        ("noise", "{kind: gausian, std: 1}", "run.yaml:2 noise.kind: unknown kind 'gausian' (did you mean gaussian?)"),
        ("noise", "{std: 1}", "run.yaml:2 noise: noise.kind is missing; it has no default."),
        ("noise", "{kind: gaussian}", "run.yaml:2 noise: noise.std is missing; it has no default."),
        ("noise", "{kind: gaussian, sdt: 1, std: 1}", "run.yaml:2 noise.sdt: unknown key (did you mean std?)"),
        ("noise", "{kind: gaussian, std: -1}", "run.yaml:2 noise.std: expected a number > 0 or a list of such numbers or auto"),
        ("noise", "{kind: gaussian, std: guess}", "run.yaml:2 noise.std: expected a number > 0"),
        ("noise", "{kind: gaussian, std: [0.1, .nan]}", "run.yaml:2 noise.std: expected a number > 0"),
        ("noise", "{kind: poisson, gain: 0, background: 0}", "run.yaml:2 noise.gain: expected greater than 0"),
        ("loss", "[{name: sur}]", "run.yaml:3 loss.0.name: unknown name 'sur' (did you mean sure?)"),
        ("loss", "[{name: sure}, {name: recorrupted}]", "run.yaml:3 loss.1: loss.1.share is missing; it has no default."),
        ("loss", "[{name: recorrupted, share: 1}]", "run.yaml:3 loss.0.share: expected less than 1, got 1"),
        ("loss", "[]", "run.yaml:3 loss: expected a list of 1 or more, got []"),
        ("loss", "sure", "run.yaml:3 loss: expected a list, got 'sure'"),
        ("loss", "{name: sure}", "run.yaml:3 loss: expected a list, got {'name': 'sure'}"),
        (
            "loss",
            "[{name: equivariant_imaging, noisy: true, groups: [{kind: shifts, raech: 1}]}]",
            "run.yaml:3 loss.0.groups.0.raech: unknown key (did you mean reach?)",
        ),
        ("network", "{kind: backprojected, widths: [9]}", "run.yaml:4 network.widths.0: expected a multiple of 8, got 9"),
        ("training", "{steps: 1, batch_size: 1}", "run.yaml:5 training: training.learning_rate is missing; it has no default."),
        ("data", "{file: a.npz}", "run.yaml:1 data.file: unknown key"),
        ("network", "{kind: blind_spot, blocks: [1]}", "run.yaml:4 network.blocks: unknown key (known here: kind, width, depth)"),
    ],
)
def test_mistakes_among_choices_and_in_lists_have_their_place(tmp_path: Path, section: str, text: str, expected: str) -> None:
    content = "".join(f"{name}: {text if name == section else value}\n" for name, value in GOOD.items())
    found = train_problems(tmp_path, content)
    assert any(line.startswith(expected) for line in found), found


def test_what_nobody_gave_is_asked_for_by_file_and_key(tmp_path: Path) -> None:
    assert train_problems(tmp_path, "")[0] == "run.yaml data: data is missing; it has no default."
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in GOOD.items()))
    loaded = load(TrainConfig, path)
    assert loaded.where("noise").endswith("run.yaml:2 noise")
    assert loaded.where("operator").endswith("run.yaml operator")


@pytest.mark.parametrize(("text", "value"), [("[0.1, 0.2]", [0.1, 0.2]), ("auto", "auto"), ("0.5", 0.5)])
def test_a_level_is_plain_in_the_record_without_a_warning(
    tmp_path: Path, text: str, value: object, recwarn: pytest.WarningsRecorder
) -> None:
    content = GOOD | {"noise": f"{{kind: gaussian, std: {text}}}"}
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {section}\n" for name, section in content.items()))
    assert load(TrainConfig, path).config.identity()["noise"]["std"] == value
    assert not recwarn


def test_the_training_section_is_exactly_the_plan() -> None:
    assert set(TrainingSection.model_fields) == {field.name for field in dataclasses.fields(TrainingPlan)}
    for field in dataclasses.fields(TrainingPlan):
        if field.name not in ("steps", "batch_size", "learning_rate", "deadline"):
            assert TrainingSection.model_fields[field.name].default == field.default


def test_a_level_is_a_number_a_word_or_a_list(tmp_path: Path) -> None:
    for text, expected in (("1e-3", 1e-3), ("auto", "auto"), ("data", "data"), ("[1, 2e-1]", (1.0, 0.2))):
        path = tmp_path / "run.yaml"
        path.write_text("".join(f"{n}: {v}\n" for n, v in (GOOD | {"noise": f"{{kind: gaussian, std: {text}}}"}).items()))
        assert load(TrainConfig, path).config.noise.std == expected
    assert DataSection().scale == "auto"
