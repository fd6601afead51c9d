"""A run: what is done with every object, which product is whose, and the making of one.

A product's key is a hash of everything that decides its numbers, so that "done" means: a valid file with the right key.
Invariant: a product depends on its object and the run, not on who makes it, when, or what else there is to do.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffinv import __version__
from diffinv.core.checks import ConfigError, DiffinvError, InputError
from diffinv.data.atomic import remove_parts, write_atomically
from diffinv.data.catalog import Entry
from diffinv.data.found import record_hash
from diffinv.data.inputs import file_digest, input_digest
from diffinv.data.layouts import InputOptions
from diffinv.data.observation import SkyObservation, observe
from diffinv.data.packs import Packs
from diffinv.data.products import product_path, read_product, safe_id, write_product
from diffinv.engine.calibration import Calibration, regime_of
from diffinv.engine.channels import Channel, build_channels, split_channel
from diffinv.engine.draws import Method
from diffinv.engine.manifest import FOLDER, QUARANTINE, check_folder
from diffinv.engine.names import object_seed
from diffinv.engine.objects import Answer, answer_channels, build_product, check_target, make_provenance, rows_of
from diffinv.priors.store import Prior

TOGETHER_ON_DEVICE = 32  # objects, whose 32 draws each are the rows of `memory.MOST_ROWS_ON_DEVICE`
_NO_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


@dataclass(frozen=True)
class Plan:
    """How every object is treated.

    options: of reading. method, draws, seed: of sampling. target_fwhm: arcsec, None for the prior's. margin: output pixels or
    None. save_samples: keep the draws. max_batch: rows at once, None for as many as fit beside the run's other `processes`.
    objects: of one shape sampled together at most, None for what suits the device. identity: the configuration that decides the
    numbers. calibration: applied to products of data like its simulations. held_out: share of the data's information that judges
    draws from the rest, or None. pack: objects whose products go into one file, None for a file an object.
    """

    options: InputOptions
    method: Method
    draws: int
    seed: int
    target_fwhm: float | None
    margin: int | None
    save_samples: bool
    max_batch: int | None
    identity: dict[str, Any]
    processes: int = 1
    calibration: Calibration | None = None
    held_out: float | None = None
    pack: int | None = None
    objects: int | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """An object that is ready to be sampled: what was read, its channels, its seed and the path of its product."""

    observation: SkyObservation
    channels: tuple[Channel, ...]
    seed: int
    path: Path


def prepare(out: Path) -> None:
    """Make the output directory and write into it, so that a read-only or full disk is found before anything is loaded, and
    remove what killed writers left.

    Raises: ConfigError if `products`, `quarantine` or `manifest` is a symbolic link that leads out of `out`.
    """
    for name in ("products", QUARANTINE, FOLDER):
        check_folder(out, name)
    probe = out / "products" / f".{uuid.uuid4().hex}.part"
    probe.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(probe, "xb") as stream:
            stream.write(b"diffinv")
    finally:
        probe.unlink(missing_ok=True)
    remove_parts(out)


def quarantine_path(out: Path, object_id: str) -> Path:
    """`out/quarantine/<safe_id>.json`.

    Raises: ConfigError if a symbolic link leads out of `out`.
    """
    return check_folder(out, QUARANTINE) / f"{safe_id(object_id)}.json"


class Run:
    """A run into one directory; `run.json` says which, and is written with the first product.

    Arguments: out: the directory. prior. plan. new_run: go on although `run.json` there says something else.
    Raises: ConfigError if `out` holds a run with another configuration, prior or version, with the differences; if the
    target's PSF is sharper than the prior's; or if the calibration was made for another run.
    """

    def __init__(self, out: Path, prior: Prior, plan: Plan, *, new_run: bool = False) -> None:
        self.out, self.prior, self.plan, self.packs = out, prior, plan, Packs(out)
        check_target(plan.target_fwhm, prior.card.target_fwhm)
        self.record = {
            "diffinv": __version__,
            "weights_sha256": prior.digest,
            "method": _resolved(plan.method),
            "files_sha256": _digests(plan.options),
            "configuration": _without_method(plan.identity),
        }
        if plan.calibration is not None:
            plan.calibration.check_run(regime_of(self.record, self.target_fwhm))
            self.record["calibration_sha256"] = plan.calibration.digest
        self.config_hash = record_hash(self.record)
        self.recorded = False
        self.pace = 1  # objects that are read at once: what could be sampled together, as soon as some have been
        self.new_run = new_run
        self._check_record()

    @property
    def target_fwhm(self) -> float:
        """Of the products' PSF, arcsec."""
        return self.plan.target_fwhm if self.plan.target_fwhm is not None else self.prior.card.target_fwhm

    def _check_record(self) -> None:
        path = self.out / "run.json"
        if path.exists() and not self.new_run:
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError) as error:
                raise ConfigError(f"{path}: cannot be read ({error}); give --new-run to write it again.") from error
            changes = [f"{key}: {old!r} → {new!r}" for key, old, new in differences(before, self.record)]
            if changes:
                raise ConfigError(f"{self.out}: holds another run ({'; '.join(changes)}); use another --out, or --new-run.")

    def write_record(self) -> None:
        """Once a run, as soon as it has a product.

        Raises: ConfigError if another run has written its own in the meantime.
        """
        if not self.recorded:
            self._check_record()
            text = json.dumps(self.record, indent=2, sort_keys=True)
            write_atomically(self.out / "run.json", f"{text}\n".encode())
            self.recorded = True

    def key(self, entry: Entry) -> str:
        """hash(object, input bytes, configuration, weights, version, seed)[:16]."""
        return self._key(entry, input_digest(entry, self.plan.options))

    def _key(self, entry: Entry, digest: str) -> str:
        text = json.dumps([entry.object_id, digest, self.config_hash])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def state(self, entry: Entry) -> str:
        """`done`, `to do`, or why it cannot be read."""
        try:
            return "done" if self.has(product_path(self.out, entry.object_id, self.key(entry))) else "to do"
        except DiffinvError as error:
            return str(error)

    def has(self, path: Path) -> bool:
        """Whether a valid product of this path is there, in a file of its own or in a pack."""
        return is_product(path) or self.packs.hold(path)

    @property
    def together(self) -> int:
        """Objects that are sampled together at most."""
        return self.plan.objects or suit(next(self.prior.parameters()).device.type)

    def company(self, subjects: Sequence[Subject]) -> int:
        """How many of these can be sampled together: not more than fill the rows that fit."""
        if self.together == 1:
            return 1
        channels = [channel for subject in subjects for channel in subject.channels]
        rows = self.plan.max_batch or rows_of(channels, self.prior, self.plan.processes)
        return max(1, min(self.together, rows * len(subjects) // (self.plan.draws * len(channels))))

    def make(self, entry: Entry, path: Path, report: Callable[[float], None]) -> None:
        """Sample an object and write its product.

        Arguments: path: of the product. report: called with the fraction done.
        Raises: as `read`, `sample` and `write`.
        """
        subject = self.read(entry, path)
        (answers,) = self.sample([subject], report)
        self.write(subject, answers)

    def read(self, entry: Entry, path: Path) -> Subject:
        """An object's data.

        Arguments: path: of the product.
        Raises: InputError if its file cannot be used, DiffinvError if it is not the one that the product's key is of.
        """
        plan = self.plan
        observation = observe(entry, plan.options)
        if self._key(entry, observation.sha256) != key_of(path):
            raise DiffinvError(f"{entry.path}: changed while the run was about to read it; it is read again.")
        channels = build_channels(observation, self.prior, margin=plan.margin, mixing=plan.options.mixing)
        seed = object_seed(plan.seed, entry.object_id)
        if plan.held_out is not None:
            channels = tuple(split_channel(c, seed, plan.held_out) for c in channels)
        return Subject(observation, channels, seed, path)

    def write(self, subject: Subject, answers: Sequence[Answer]) -> None:
        """The product of an object.

        Raises: OSError if the disk refuses it.
        """
        plan = self.plan
        provenance = make_provenance(
            answers,
            self.prior,
            plan.method,
            version=__version__,
            config_hash=self.config_hash,
            seed=subject.seed,
            input_sha256=subject.observation.sha256,
            target_fwhm=self.target_fwhm,
            key=key_of(subject.path),
        )
        product = build_product(subject.observation, subject.channels, answers, provenance, save_samples=plan.save_samples)
        write_product(subject.path, product if plan.calibration is None else plan.calibration.apply(product))

    def sample(self, subjects: Sequence[Subject], report: Callable[[float], None]) -> list[list[Answer]]:
        """Draws of every channel of every object, with half the batch again and again while memory does not suffice.

        Raises: whatever sampling raises, for one of them or all.
        """
        channels = [channel for subject in subjects for channel in subject.channels]
        seeds = [subject.seed for subject in subjects for _ in subject.channels]
        answers = iter(self._answers(channels, seeds, report))
        return [list(islice(answers, len(subject.channels))) for subject in subjects]

    def _answers(self, channels: Sequence[Channel], seeds: Sequence[int], report: Callable[[float], None]) -> list[Answer]:
        plan, least = self.plan, self.plan.method.sampler.cloud
        batch = plan.max_batch or max(least, min(rows_of(channels, self.prior, plan.processes), plan.draws * len(channels)))
        while True:
            try:
                return answer_channels(
                    channels,
                    self.prior,
                    plan.method,
                    draws=plan.draws,
                    seeds=seeds,
                    target_fwhm=plan.target_fwhm,
                    max_batch=batch,
                    progress=report,
                )
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or batch // 2 < least:
                    raise
                batch //= 2
                print_error(f"out of memory; going on with {batch} rows at once")


def key_of(path: Path) -> str:
    """The key in the name of a product."""
    return path.stem.rpartition("-")[2]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could help: Python's, CUDA's and the CPU allocator's ways to say so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def is_broken_device(error: BaseException) -> bool:
    """Whether the device has failed this process, which can compute nothing more on it."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)


def suit(device: str) -> int:
    """Objects that are sampled together on a device unless one says otherwise: one fills a processor, many an accelerator."""
    return 1 if device == "cpu" else TOGETHER_ON_DEVICE


def is_product(path: Path) -> bool:
    """Whether a valid product is there: it reads, and its checksums hold."""
    if not path.is_file():
        return False
    try:
        read_product(path)
    except DiffinvError:
        return False
    return True


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every leaf where two nested dictionaries differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [d for n in names for d in differences(before.get(n), now.get(n), f"{key}.{n}" if key else n)]
    return [] if before == now else [(key, before, now)]


def print_error(text: str) -> None:
    """One line on stderr, above the progress bar if there is one."""
    tqdm.write(f"diffinv: {text}", file=sys.stderr)


def reason_of(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = " ".join(str(error).split())
    return text[:500] if isinstance(error, DiffinvError) else f"{type(error).__name__}: {text[:300]}"


def _digests(options: InputOptions) -> dict[str, str]:
    """SHA-256 of the files that the options name: another PSF in the same file is another run."""
    try:
        psfs = {f"psf {k}" if k else "psf": file_digest(path) for k, path in enumerate(options.psf or ())}
        return psfs | ({} if options.variance is None else {"variance": file_digest(options.variance)})
    except InputError as error:
        raise ConfigError(f"input.psf, input.variance: {error}") from error


def _resolved(method: Method) -> dict[str, Any]:
    """What a method is, whichever of its parts were chosen and whichever are defaults."""
    schedule = "of the prior's card" if method.schedule is None else repr(method.schedule)
    return {
        "sampler": repr(method.sampler),
        "guidance": repr(method.guidance),
        "steps": method.steps,
        "schedule": schedule,
    }


def _without_method(identity: dict[str, Any]) -> dict[str, Any]:
    """The configuration less what `_resolved` says: the same method is the same run, named or by default."""
    chosen = {key: value for key, value in identity["sampler"].items() if key not in ("name", "steps", "guidance")}
    return {**identity, "sampler": chosen}
