"""Configuration: one YAML file and `--set key=value` overrides, checked by pydantic models. The only file that reads YAML.

A file is composed into YAML's node tree, which knows line numbers, and only then turned into plain values: tags, duplicate
keys and alias bombs are found before anything is built. Invariant: every error of a file and of the overrides is reported
at once, each as `file:line key: what is wrong and the nearest valid key`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from diffinv.core.checks import ConfigError

M = TypeVar("M", bound="Section")

_MAX_BYTES = 1 << 18
_MAX_NODES = 10_000
_MAX_DEPTH = 16
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


def _split_names(value: Any) -> Any:
    """`g,r,i` as a list; a single number or name as a list of one; numbers as names."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    items = value if isinstance(value, list) else [value]
    return [str(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else item for item in items]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_split_names)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PriorSection(Section):
    """Which prior: a shipped name or the path of a .safetensors file."""

    name: str = "galaxies-64"


class InputSection(Section):
    """What an input file does not say itself; no noise, PSF, unit or scale has a default. Paths: from the working directory."""

    psf: Path | None = None
    psf_oversample: Positive | None = None
    psf_kind: Literal["effective", "optical"] | None = None
    psf_norm: Positive | None = None
    variance: Path | None = None
    noise_std: Annotated[tuple[Positive, ...], BeforeValidator(_as_list)] | None = None
    bands: Names | None = None
    unit: str | None = None
    pixel_scale: Positive | None = None
    zeropoint: Annotated[float, Field(allow_inf_nan=False)] | None = None
    dq_bits: Annotated[int, Field(ge=0)] | None = None
    mask_planes: Names | None = None
    hdu: int | str | None = None
    max_pixels: Count = 2**26


class GuidanceSection(Section):
    """How the likelihood enters; without a name, the choice of `diffinv.reconstruct`."""

    name: str | None = None
    iterations: Count | None = None
    tol: Positive | None = None


class SamplerSection(Section):
    """How draws are made; without a name or steps, the choice of `diffinv.reconstruct`."""

    name: str | None = None
    steps: Count | None = None
    samples: Annotated[int, Field(ge=2, le=100_000)] = 32
    seed: Seed = 0
    max_batch: Count | None = None
    guidance: GuidanceSection = GuidanceSection()


class OutputSection(Section):
    """What a product holds: `samples` stores the draws; `target_psf` is the answer's resolution (arcsec, Gaussian FWHM; without
    it the prior's); `margin` is sampled around the field and cut off (output pixels; without it the width of the PSF where
    the field is larger than the prior's)."""

    samples: bool = True
    target_psf: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    margin: Annotated[int, Field(ge=0, le=512)] | None = None


class SampleConfig(Section):
    """The configuration of `diffinv sample` and `diffinv inspect`."""

    prior: PriorSection = PriorSection()
    input: InputSection = InputSection()
    sampler: SamplerSection = SamplerSection()
    output: OutputSection = OutputSection()
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a product, as plain values: everything but the device and the batch size."""
        return self.model_dump(mode="json", exclude={"device": True, "sampler": {"max_batch"}})


class SimulateSection(Section):
    """Mock observations: a survey, its bands, how many galaxies. `cosmos` is the folder with the COSMOS tables and stamps;
    without it galaxies are drawn from analytic distributions alone. `flux_ratios`: flux in each band over the first."""

    survey: Literal["lsst", "lsst_year_1", "hsc_wide", "euclid_vis"]
    bands: Names
    count: Count = 1
    seed: Seed = 0
    psf_size: Annotated[int, Field(ge=9, le=255)] = 41
    flux_ratios: tuple[Positive, ...] | None = None
    cosmos: Path | None = None


class SimulateConfig(Section):
    """The configuration of `diffinv simulate`."""

    simulate: SimulateSection


@dataclass(frozen=True)
class Override:
    """A value from the command line. label: as errors name it. key: dotted. text: YAML."""

    label: str
    key: str
    text: str


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A checked configuration and where each key came from."""

    config: M
    places: dict[str, str]

    def where(self, key: str) -> str:
        """`run.yaml:3 sampler.name`, `--set sampler.name`, or the bare key if nobody gave it."""
        return self.places.get(key, key)


def parse_set(text: str) -> Override:
    """An override from the text of `--set key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, for example --set sampler.steps=32.")
    return Override(f"--set {key.strip()}", key.strip(), value)


def load(model: type[M], path: Path | None, overrides: Sequence[Override] = ()) -> Loaded[M]:
    """Read and check a configuration.

    Arguments:
        model: the root section. path: the YAML file, or None for defaults. overrides: in order, the last one wins.
    Returns: the configuration with the place of each given key.
    Raises: ConfigError with one line an error.
    """
    reading = _Reading()
    values = _read_file(path, reading) if path is not None else {}
    for override in overrides:
        _apply_override(values, override, reading)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        found = [_describe(model, dict(item), reading.places) for item in error.errors()]
        known = {problem.partition(": ")[0] for problem in reading.problems}
        reading.problems += [problem for problem in found if problem.partition(": ")[0] not in known]
    if reading.problems:
        raise ConfigError("\n".join(dict.fromkeys(reading.problems)))
    return Loaded(config, reading.places)


@dataclass
class _Reading:
    """What one `load` has met so far."""

    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    nodes: int = 0


def _read_file(path: Path, reading: _Reading) -> dict[str, Any]:
    try:
        with open(path, "rb") as handle:
            content = handle.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file.") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {_MAX_BYTES // 1024} kB; is this a configuration file?")
    node = _compose(content, str(path))
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1} expected `section:` with keys below it, got {node.id}.")
    return _to_plain(node, "", lambda n: f"{path}:{n.start_mark.line + 1}", reading, 0)


def _compose(content: bytes | str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line} not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deeply; {_MAX_DEPTH} levels are allowed.") from error


def _to_plain(node: yaml.Node, key: str, place, reading: _Reading, depth: int) -> Any:
    """A node as dicts, lists and scalars; every problem is noted with its place and reading goes on."""
    reading.nodes += 1
    here = f"{place(node)} {key}".rstrip()
    if key:
        reading.places[key] = here
    if reading.nodes > _MAX_NODES or depth > _MAX_DEPTH:
        raise ConfigError(f"{here}: expands to more than {_MAX_NODES} values or {_MAX_DEPTH} levels (aliases?); write it out.")
    if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
        return _to_dict(node, key, place, reading, depth)
    if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
        return [_to_plain(child, f"{key}.{i}", place, reading, depth + 1) for i, child in enumerate(node.value)]
    if node.tag not in _PLAIN_TAGS and node.tag != "tag:yaml.org,2002:timestamp":
        reading.problems.append(f"{here}: tag {node.tag} is not allowed; give a plain value.")
        return None
    return _to_scalar(node, here, reading)


def _to_scalar(node: yaml.Node, here: str, reading: _Reading) -> Any:
    if node.tag.endswith(":timestamp"):
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError):
        reading.problems.append(f"{here}: {str(node.value)[:40]!r} is not of type {node.tag.rpartition(':')[2]}.")
        return None


def _to_dict(node: yaml.MappingNode, key: str, place, reading: _Reading, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, child in node.value:
        if not isinstance(name, yaml.ScalarNode) or name.tag.endswith(":merge"):
            reading.problems.append(f"{place(name)} {key}: keys are plain names; merges and nested keys are not allowed.")
            continue
        full = f"{key}.{name.value}" if key else name.value
        if name.value in values:
            reading.problems.append(f"{place(name)} {full}: duplicate key (first on line {lines[name.value]}); keep one.")
            continue
        lines[name.value] = name.start_mark.line + 1
        values[name.value] = _to_plain(child, full, place, reading, depth + 1)
        reading.places[full] = f"{place(name)} {full}"
    return values


def _apply_override(values: dict[str, Any], override: Override, reading: _Reading) -> None:
    node = _compose(override.text, override.label)
    value = None if node is None else _to_plain(node, "", lambda _: override.label, reading, 0)
    *sections, last = override.key.split(".")
    for depth, section in enumerate(sections, 1):
        reading.places.setdefault(".".join(sections[:depth]), override.label)
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            reading.problems.append(f"{override.label}: {section} holds a value, not keys.")
            return
        values = inner
    values[last] = value
    reading.places[override.key] = override.label


def _describe(model: type[Section], error: dict[str, Any], places: dict[str, str]) -> str:
    """One validation error as `place: what is wrong`."""
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    place = _nearest_place(loc, places)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key ({_suggestion(model, loc)})"
    if error["type"] == "missing":
        return f"{place}: {key} is missing; it has no default."
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{place}: is a section; put its keys ({', '.join(_fields_at(model, loc))}) below it."
    given = repr(error["input"])
    reason = error["msg"].removeprefix("Input should be ").removeprefix("a valid ").partition(", unable")[0]
    if error["type"] == "string_pattern_mismatch":
        reason = "auto, cpu, cuda or cuda:N"
    return f"{place}: expected {reason}, got {given if len(given) <= 60 else given[:57] + '...'}"


def _nearest_place(loc: list[str], places: dict[str, str]) -> str:
    for end in range(len(loc), 0, -1):
        key = ".".join(loc[:end])
        if key in places:
            return places[key]
    return ".".join(loc)


def _fields_at(model: type[Section], loc: Sequence[str]) -> list[str]:
    """The keys of the section at `loc`."""
    for name in loc:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return []
        model = annotation
    return list(model.model_fields)


def _suggestion(model: type[Section], loc: Sequence[str]) -> str:
    *section, name = loc
    siblings = _fields_at(model, section)
    near = difflib.get_close_matches(name, siblings, 1) or difflib.get_close_matches(".".join(loc), all_keys(model), 1)
    near = near or [key for key in all_keys(model) if key.rpartition(".")[2] == name][:1]
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"


def all_keys(model: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a root section that takes a value."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += all_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
