"""A training from start to file: what the data tell beforehand, every refusal, the record of the run, and the reconstructor.

Before the first step: the unit of the network, a rehearsal of the loss on two rows, and the test of what the data can teach
at all. Whatever is refused, is refused there.
Invariant: `run.json` says what decides the weights; a folder never holds two trainings.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn

from diffinv.core.checks import ConfigError, DiffinvError, UnsupportedError
from diffinv.core.rng import Rng
from diffinv.data.atomic import write_atomically
from diffinv.data.fits import Plane, encode_fits
from diffinv.data.locks import only_one_in
from diffinv.engine.commute import check_moves
from diffinv.engine.devices import own_device
from diffinv.engine.levels import brightness, evenly, fingerprint, image_scale, noise_std, take, white_twin
from diffinv.engine.run import differences, is_out_of_memory
from diffinv.losses.base import Loss, MeasuredBatch
from diffinv.losses.identifiability import Identifiability, check_group_helps, identifiability, require_identifiable
from diffinv.noise.unknown import UnknownLevel
from diffinv.operators.groups import Group
from diffinv.reconstructors.designs import Design, initialise
from diffinv.report.figures import SPREAD, Linear, png
from diffinv.training.loop import Trainer
from diffinv.training.measured import Rescaled
from diffinv.training.plan import TrainingPlan
from diffinv.training.sources import Source, split
from diffinv.training.store import ReconstructorCard, Use, save_reconstructor

CHECKPOINT, RECORD, RESULT = "checkpoint.safetensors", "run.json", "reconstructor.safetensors"
_ELEMENTS, _REHEARSAL = 0x1DE, 0x2EA


@dataclass(frozen=True, eq=False)
class Levels:
    """What losses are built with that take numbers from the data. scale: s. start: of multipliers, a variance in s². source: of
    the rows to learn from, in units of s.
    """

    scale: float
    start: float | None
    source: Source


@dataclass(frozen=True)
class Inspection:
    """The test before the training. signal, noise_level: in the unit of image and data, None for estimates.

    required: False where true images teach what the data do not show. Other fields: as in the configuration.
    """

    least_seen: float
    allow_unidentifiable: bool
    signal: float | None
    noise_level: float | None
    rows: int
    elements: int
    required: bool


@dataclass(frozen=True, eq=False)
class Job:
    """All of a training, in the unit of the data.

    Arguments:
        source: measurements. held_out: share for validation, 0 for none. scale: in the image's unit, None for `image_scale`.
        unit: BUNIT. design, use: of the network. loss: from the levels. start: σ that multipliers start from, None for an
            estimate. multipliers: whether there are any. groups: of the losses that have one. plan: with a multiplier_rate
            over the starting variance. inspection. identity: the configuration. facts: what was found on the way.
    """

    source: Source
    held_out: float
    scale: float | None
    unit: str
    design: Design
    use: Use | None
    loss: Callable[[Levels], Loss]
    start: float | None
    multipliers: bool
    groups: tuple[Group, ...]
    plan: TrainingPlan
    inspection: Inspection
    identity: dict[str, Any]
    facts: dict[str, Any]


def learn(job: Job, out: Path, *, resume: bool, new_run: bool = False, say: Callable[[str], None]) -> Path:
    """Train, and write the reconstructor to `out`; returns its path.

    Arguments: job. out: the folder. resume: go on from its checkpoint. new_run: although its record says something else.
    say: takes lines for the user.
    Raises: ConfigError if the folder holds a training and `resume` is not set, or another training than this one, with the
    differences, and where memory does not suffice; UnsupportedError where the loss cannot do with the data, a group adds
    nothing, or too much is unseen.
    """
    _check_folder(out, resume=resume, new_run=new_run)
    try:
        with only_one_in(out) if is_main_process() else nullcontext():
            return _learn(job, out, resume=resume, new_run=new_run, say=say)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"training: out of memory with training.batch_size {job.plan.batch_size}; lower it, or give smaller images."
        ) from error


def _learn(job: Job, out: Path, *, resume: bool, new_run: bool, say: Callable[[str], None]) -> Path:
    main = is_main_process()
    tell = say if main else lambda line: None
    scale = image_scale(job.source) if job.scale is None else job.scale
    train, held = _split(job)
    source, validation = Rescaled(train, scale), None if held is None else Rescaled(held, scale)
    levels = Levels(scale, _start(job, scale), source)
    loss, shape = job.loss(levels), take(source, torch.tensor([0])).observation.image_shape
    model = job.design.build(shape)
    initialise(model, job.plan.seed)
    tell(f"{len(train)} rows to learn from, {0 if held is None else len(held)} held out; images {tuple(shape)}")
    tell(f"scale {scale:.6g} {job.unit}".rstrip() + (" (rms of the back-projected images)" if job.scale is None else ""))
    rehearse(model, loss, source, job.plan.precision)
    plan = job.plan
    if job.multipliers:
        plan = replace(plan, multiplier_rate=plan.multiplier_rate * levels.start)
    trainer = Trainer(model, loss, source, plan, out, validation)
    trainer.check()
    record = {"configuration": job.identity, "found": {**job.facts, "scale": scale, **_known(job.source)}}
    before = _recorded(out, record, resume=resume, new_run=new_run)
    sight = before["identifiability"] if before else _inspect(job, source, scale, out if main else None)
    tell(sight)
    record["identifiability"] = sight
    write = (lambda: _write_record(out, record)) if main else lambda: None
    trained = trainer.run(resume=resume, started=write)
    if main:
        tell(_last_line(out))
        training = {**record, "validation": _last_look(out)}
        card = ReconstructorCard(out.name, job.design, job.use, tuple(shape), scale, job.unit, training)
        save_reconstructor(out / RESULT, trained, card)
    return out / RESULT


def is_main_process() -> bool:
    """Whether this process speaks and writes for all: the first of torch's launchers, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def rehearse(model: nn.Module, loss: Loss, source: Source, precision: str) -> None:
    """One look at two rows, for refusals that only the network or a draw of the noise can raise.

    Raises: UnsupportedError, also for what torch itself cannot do with this network, loss and precision.
    """
    rows = evenly(len(source), 2)
    batch, rng = take(source, rows), Rng.for_draws(0, rows, 1).spawn(_REHEARSAL)
    loss.check(batch)
    kind, device = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision), _device()
    try:
        with torch.no_grad(), torch.autocast(device.partition(":")[0], dtype=kind, enabled=kind is not None):
            loss(model.to(device), batch.to(device), rng.to(device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UnsupportedError(
            f"rehearsal: {type(model).__name__} and {type(loss).__name__} do not go together at precision {precision} "
            f"({reason}); change one of the three."
        ) from error


def _split(job: Job) -> tuple[Source, Source | None]:
    """What is learnt from, and what is held out."""
    if not job.held_out:
        return job.source, None
    try:
        return split(job.source, job.held_out)
    except DiffinvError as error:
        raise ConfigError(f"{error} data.held_out: 0 trains on all rows, without validation.") from error


def _check_folder(out: Path, *, resume: bool, new_run: bool) -> None:
    begun = (out / CHECKPOINT).exists()
    if begun and not resume:
        raise ConfigError(f"{out}: holds a training already; go on with --resume, or give another --out.")
    if begun and not new_run and not (out / RECORD).exists():
        raise ConfigError(f"{out}: holds a checkpoint without its {RECORD}; give another --out, or --new-run.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give --out the name of a folder.")


def _known(source: Source) -> dict[str, Any]:
    """By what the data are known again."""
    return {"rows": len(source), "sha256": fingerprint(source)}


def _start(job: Job, scale: float) -> float | None:
    """The variance that multipliers start from, in units of scale²."""
    if not job.multipliers:
        return None
    std = float(noise_std(job.source)[0].median()) if job.start is None else job.start
    return (std / scale) ** 2


def _recorded(out: Path, record: dict[str, Any], *, resume: bool, new_run: bool) -> dict[str, Any] | None:
    """What `run.json` says, if this is the same training and it is to go on.

    Raises: ConfigError with the differences, unless `new_run`.
    """
    path = out / RECORD
    if not resume or not path.exists():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changes = differences({k: before[k] for k in record}, json.loads(json.dumps(record)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the record of a training ({error}); start without --resume elsewhere.") from error
    if changes and not new_run:
        listed = "; ".join(f"{key}: {old!r} → {new!r}" for key, old, new in changes)
        raise ConfigError(f"{out}: holds another training ({listed}); use another --out, or --new-run.")
    return None if changes else before


def _write_record(out: Path, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def _inspect(job: Job, source: Source, scale: float, out: Path | None) -> str:
    """Test what the data can teach; write the map of what they cannot, and return the line that says so."""
    inspection = job.inspection
    batch = take(source, evenly(len(source), inspection.rows))
    signal = brightness(source) if inspection.signal is None else inspection.signal / scale
    best: Identifiability | None = None
    for group in job.groups:
        check_moves(batch.observation, group)
    for group in job.groups or (None,):
        found = _identify(batch, group, source, signal, scale, inspection)
        if group is not None:
            check_group_helps(found)
        best = found if best is None or found.seen > best.seen else best
    if out is not None:
        _write_map(out, best)
    if inspection.required:
        require_identifiable(best, least_seen=inspection.least_seen, allow_unidentifiable=inspection.allow_unidentifiable)
    unit = f" {job.unit}" if job.unit else ""
    return (
        f"{best}; unseen at a signal of {signal * scale:.3g}{unit}: {100 * (1 - best.seen):.1f} %, mapped in identifiability.fits"
    )


def _identify(
    batch: MeasuredBatch, group: Group | None, source: Source, signal: float, scale: float, inspection: Inspection
) -> Identifiability:
    data = batch.observation
    if not data.quadratic or isinstance(data.noise, UnknownLevel):
        level = None if inspection.noise_level is None else inspection.noise_level / scale
        if level is None and isinstance(data.noise, UnknownLevel):
            level = float(noise_std(source)[0].median())
        data, _ = white_twin(data, level)
    device = _device()
    rng = Rng.for_draws(_ELEMENTS, [0], 1).to(device)
    return identifiability(data.to(device), group, rng=rng, signal=signal, elements=inspection.elements)


def _device() -> str:
    """Where the work before the training is done."""
    return own_device("cuda") if torch.cuda.is_available() else "cpu"


def _write_map(out: Path, found: Identifiability) -> None:
    """identifiability.fits and .png: the share of each pixel that no measurement sees, 0 to 1."""
    out.mkdir(parents=True, exist_ok=True)
    unseen = found.map.cpu().numpy()
    header = {"SEEN": found.seen, "ALONE": found.without, "OBJECT": "share of a pixel that is unseen"}
    write_atomically(out / "identifiability.fits", encode_fits([Plane("PRIMARY", unseen.astype("float32"), header)]))
    wide = rearrange(unseen, "c h w -> h (c w)")  # bands side by side
    write_atomically(out / "identifiability.png", base64.b64decode(png(wide, Linear(0.0, 1.0), SPREAD).partition(",")[2]))


def _last_look(out: Path) -> dict[str, Any] | None:
    """The last row of the log that has a validation."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return next((row for row in reversed(rows) if "validation" in row), None)


def _last_line(out: Path) -> str:
    """What became of the held-out loss."""
    look = _last_look(out)
    if look is None:
        return "trained without validation"
    chosen = f"; the best average, of step {look['best']}, is kept" if look.get("best") is not None else ""
    return f"held-out loss {look['validation']:.5g} ± {look['error']:.2g} at step {look['step']}{chosen}"
