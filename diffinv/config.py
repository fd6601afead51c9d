"""Configuration: one YAML file and `--set key=value` overrides, checked by pydantic models. The only file that imports them.

What sections are written with is here too: `Section`, `Field` and the types of values; the sections are in `diffinv.sections`.

A file is composed into YAML's node tree, which knows line numbers, and only then turned into plain values: tags, duplicate
keys and alias bombs are found before anything is built. Invariant: every error of a file and of the overrides is reported
at once, each as `file:line key: what is wrong and the nearest valid key`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from diffinv.core.checks import ConfigError

M = TypeVar("M", bound="Section")

_MAX_BYTES = 1 << 18
_MAX_NODES = 10_000
_MAX_DEPTH = 16
_REASONS = {
    "string_pattern_mismatch": "auto, cpu, cuda or cuda:N",
    "tuple_type": "a list",
    "path_type": "a path",
    "too_short": "a list of {min_length} or more",
}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


def _split_names(value: Any) -> Any:
    """`g,r,i` as a list; a single number or name as a list of one; numbers as names."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    items = value if isinstance(value, list) else [value]
    return [str(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else item for item in items]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return value
    raise ValueError("two numbers, [x, y]")


def positive_or(*words: str, several: bool = False) -> Any:
    """The type of a value that is a number > 0, one of some words, or, with `several`, a list of such numbers."""
    allowed = " or ".join(["a number > 0", *(["a list of such numbers"] if several else []), *words])

    def check(value: Any) -> float | str | tuple[float, ...]:
        if isinstance(value, str) and value in words:
            return value
        given = value if several and isinstance(value, list) and value else [value]
        try:
            numbers = tuple(float(v) for v in given if not isinstance(v, bool))
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != len(given) or not all(0 < v < math.inf for v in numbers):
            raise ValueError(allowed)
        return numbers if isinstance(value, list) else numbers[0]

    plain = PlainSerializer(lambda value: list(value) if isinstance(value, tuple) else value, when_used="json")
    return Annotated[float | str | tuple[float, ...], PlainValidator(check), plain]


def _stamp_or_path(value: Any) -> Path | tuple[tuple[float, ...], ...]:
    if isinstance(value, str) and value:
        return Path(value)
    try:
        rows = tuple(tuple(float(v) for v in row) for row in value)
    except (TypeError, ValueError):
        rows = ()
    if not rows or not rows[0] or any(len(row) != len(rows[0]) or not all(map(math.isfinite, row)) for row in rows):
        raise ValueError("the name of a file, or rows of numbers, all of one length")
    return rows


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_split_names)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Position = Annotated[tuple[Number, Number], BeforeValidator(_pair)]
Share = Annotated[float, Field(gt=0, lt=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
StampOrPath = Annotated[
    Path | tuple[tuple[float, ...], ...],
    PlainValidator(_stamp_or_path),
    PlainSerializer(lambda value: str(value) if isinstance(value, Path) else value, when_used="json"),
]
PositiveList = Annotated[tuple[Positive, ...], BeforeValidator(_as_list)]
Paths = Annotated[
    tuple[Path, ...],
    Field(min_length=1),
    BeforeValidator(_as_list),
    PlainSerializer(lambda paths: str(paths[0]) if len(paths) == 1 else list(map(str, paths)), when_used="json"),
]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Override:
    """A value from the command line. label: as errors name it. key: dotted. text: YAML."""

    label: str
    key: str
    text: str


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A checked configuration and where each key came from; the file itself is under ""."""

    config: M
    places: dict[str, str]

    def where(self, key: str) -> str:
        """`run.yaml:3 sampler.name`, `--set sampler.name`, or, if nobody gave it, `run.yaml sampler.name`."""
        return _nearest_place([key], self.places)


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
    reading = _Reading({} if path is None else {"": str(path)})
    values = _read_file(path, reading) if path is not None else {}
    for override in overrides:
        _apply_override(values, override, reading)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        found = [_describe(model, dict(item), reading.places) for item in error.errors() if not _follows(dict(item))]
        known = {problem.partition(": ")[0] for problem in reading.problems}
        reading.problems += [problem for problem in found if problem.partition(": ")[0] not in known]
    if reading.problems:
        raise ConfigError("\n".join(dict.fromkeys(reading.problems)))
    return Loaded(config, reading.places)


def has_section(path: Path, name: str) -> bool:
    """Whether a configuration file has a section of this name. Raises ConfigError if it cannot be read."""
    return name in _read_file(path, _Reading({"": str(path)}))


@dataclass
class _Reading:
    """What one `load` has met so far. places: of the keys, and of the file under ""."""

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
    loc, found = _walk(model, error["loc"])
    place = _nearest_place(loc, places)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key ({_suggestion(model, found, loc)})"
    if error["type"] == "missing":
        return f"{place}: {'.'.join(loc)} is missing; it has no default."
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{place}: is a section; put its keys ({', '.join(_keys(found))}) below it."
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _describe_choice(error, loc, places)
    given = repr(error["input"])
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    reason = reason.removeprefix("a valid ").partition(", unable")[0]
    if error["type"] in _REASONS:
        reason = _REASONS[error["type"]].format_map(error.get("ctx", {}))
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{place}: {reason}"
    return f"{place}: expected {reason}, got {given if len(given) <= 60 else given[:57] + '...'}"


def _follows(error: dict[str, Any]) -> bool:
    """Whether a list is called too short only because of errors in its items."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _describe_choice(error: dict[str, Any], loc: list[str], places: dict[str, str]) -> str:
    """A word that chooses among sections is missing or unknown."""
    key = error["ctx"]["discriminator"].strip("'")
    if error["type"] == "union_tag_not_found":
        return f"{_nearest_place(loc, places)}: {'.'.join([*loc, key])} is missing; it has no default."
    tag, known = error["ctx"]["tag"], [word.strip("' ") for word in error["ctx"]["expected_tags"].split(",")]
    near = difflib.get_close_matches(tag, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{_nearest_place([*loc, key], places)}: unknown {key} {tag!r} ({hint})"


def _nearest_place(loc: list[str], places: dict[str, str]) -> str:
    for end in range(len(loc), 0, -1):
        key = ".".join(loc[:end])
        if key in places:
            return places[key]
    return f"{places.get('', '')} {'.'.join(loc)}".lstrip()


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Every section that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _word(section: type[Section]) -> str | None:
    """What `kind` or `name` says where this section is one of several."""
    for key in ("kind", "name"):
        field = section.model_fields.get(key)
        if field is not None and get_origin(field.annotation) is Literal:
            return get_args(field.annotation)[0]
    return None


def _walk(model: type[Section], loc: Sequence[str | int]) -> tuple[list[str], list[type[Section]]]:
    """The keys of an error's location, without pydantic's names for the choices, and the sections that hold the last of them."""
    keys: list[str] = []
    here, inner = [model], [model]
    for part in loc:
        chosen = [section for section in inner if len(inner) > 1 and _word(section) == part]
        if chosen:
            inner = chosen
        elif isinstance(part, int):
            keys.append(str(part))
        elif inner:
            here = inner
            keys.append(part)
            inner = [s for section in here if part in section.model_fields for s in _field_sections(section, part)]
    return keys, inner or here


def _field_sections(section: type[Section], key: str) -> list[type[Section]]:
    return _sections_in(section.model_fields[key].annotation)


def _keys(sections: Sequence[type[Section]]) -> list[str]:
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _suggestion(model: type[Section], found: Sequence[type[Section]], loc: Sequence[str]) -> str:
    """The nearest key: of the same section, else of another one; never of a choice that was not made."""
    *section, name = [part for part in loc if not part.isdigit()]
    siblings, here = _keys(found), ".".join(section)
    known = [key for key in all_keys(model) if key.rpartition(".")[0] != here]
    near = difflib.get_close_matches(name, siblings, 1) or difflib.get_close_matches(".".join([*section, name]), known, 1)
    near = near or [key for key in known if key.rpartition(".")[2] == name][:1]
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"


def all_keys(model: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a root section that takes a value."""
    keys: list[str] = []
    for name in model.model_fields:
        inner = _field_sections(model, name)
        keys += [key for section in inner for key in all_keys(section, f"{prefix}{name}.")] or [prefix + name]
    return list(dict.fromkeys(keys))
