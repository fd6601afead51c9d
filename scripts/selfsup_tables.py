"""The tables of the self-supervised benchmark, from the record of its runs: gaps to the twin, identifiability, cost a step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from linear_reconstruction import AffineEstimate
from selfsup_plan import BATCH, HELD_OUT, RATE, SURVEY_SEED, TRAINING
from selfsup_problems import TRAINED, USUAL, Problem, Recipe, Size
from torch import Tensor

from diffinv.core.rng import Rng
from diffinv.losses.identifiability import identifiability
from diffinv.report.tables import write_table
from diffinv.training.ema import ExponentialMovingAverage
from diffinv.training.sources import Simulated, Source

ROUNDS, CLIP, MASKS, ELEMENTS = 16, 1.0, 16, 64


SIZES = {"step": TRAINED, "step, usual size": USUAL}


def step_times(problem: Problem, source: Source, size: Size) -> dict[str, float]:
    """Time of a training step over that of a supervised one: data, loss, backward, clipping, update and average, as in `Trainer`;
    losses in turns, the median over rounds of the ratio to the supervised step of the same round."""
    index, rng = torch.arange(BATCH), Rng.for_draws(0, range(BATCH), 1)
    y = source.batch(index, rng).observation.y
    steps = {
        name: _step(recipe, size, y, lambda number: source.batch(index + BATCH * number, rng))
        for name, recipe in problem.recipes.items()
    }
    return ratios(steps, "supervised")


def ratios(steps: dict[str, Callable[[int], None]], plain: str) -> dict[str, float]:
    """Median over rounds of the time of a step over that of the plain one of the same round; the first round warms up."""
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(number)
            rounds[name].append(time.perf_counter() - begin)
    return {name: median(t / own for t, own in zip(times[1:], rounds[plain][1:], strict=True)) for name, times in rounds.items()}


def _step(recipe: Recipe, size: Size, y: Tensor, batch: Callable[[int], object]) -> Callable[[int], None]:
    loss, model = recipe.loss(y), recipe.model(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    average = ExponentialMovingAverage(model, 0.99)

    def step(number: int) -> None:
        loss(model, batch(number), Rng.for_draws(number, range(len(y)), 1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model)

    return step


def untrained(problem: Problem, images: Tensor, held: Source) -> dict[str, float]:
    """PSNR of what the network is given, and of the best affine reconstruction."""
    batch = held.batch(torch.arange(HELD_OUT), Rng.for_draws(0, range(HELD_OUT), 1))
    model = problem.recipes["supervised"].model(TRAINED)
    with torch.no_grad():
        found = {"network's input": model(batch.observation), "best affine": AffineEstimate(images[:TRAINING])(batch)}
    return {name: float(-10 * (x - batch.x).square().flatten(1).mean(1).log10().mean()) for name, x in found.items()}


def seen(problem: Problem, images: Tensor, held: Source) -> dict[str, list[float]]:
    """Share of image space above the noise, by one operator alone and with each group: name → (alone, with)."""
    if not problem.groups:
        return {}
    x = images[:1024]
    signal = float(x.var(0).mean().sqrt())
    some = held.batch(torch.arange(MASKS), Rng.for_draws(0, range(MASKS), 1)).observation
    several = some.operator.batch > 1
    source = some if several or not some.noise.quadratic else some.select([0])
    level = None
    if not some.noise.quadratic:
        source = some.operator
        level = float(some.noise.variance(source(x)).mean().sqrt())
    result = {}
    for group in problem.groups:
        settings = {"rng": Rng([1]), "signal": signal, "noise_level": level, "elements": ELEMENTS}
        found = identifiability(source, group, **settings)
        result["other operators" if group is None else type(group).__name__] = [found.without, found.seen]
    return result


def gather(record: Path, runs: Path, steps: int) -> dict:
    """The record, with the runs and the peers' times that came since, and times of other records: images have no say in them."""
    blank = {"steps": steps, "runs": {}, "untrained": {}, "seen": {}, "times": {}, "peers": {}}
    known = json.loads(record.read_text()) if record.exists() else blank
    if known["steps"] != steps:
        raise SystemExit(f"{record}: holds runs of {known['steps']} steps, not {steps}; give another --record.")
    known["runs"] |= {path.stem: json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))}
    for other in sorted(record.parent.glob("selfsup_*_runs.json")):
        known["times"] = json.loads(other.read_text())["times"] | known["times"]
    peers = runs.with_name(runs.name.rsplit("-", 1)[0] + "-peers.json")
    known["peers"] |= json.loads(peers.read_text()) if peers.exists() else {}
    return known


def gaps(problem: Problem, key: str, runs: dict[str, dict], untrained: dict[str, float], times: dict[str, dict]) -> list[dict]:
    """A row a loss, over the seeds that both it and the twin have."""
    psnr = lambda name: {s.rsplit(", ", 1)[1]: r["psnr"] for s, r in runs.items() if s.rpartition(", ")[0] == f"{key}, {name}"}
    twin = psnr("supervised")
    if not twin:
        return []
    affine, best = untrained["best affine"], fmean(twin.values())
    blank = dict.fromkeys(("gap dB", "closed %", *SIZES, "multipliers"), "")
    rows = [{"problem": key, "loss": name, "seeds": "", "PSNR": f"{value:.2f}"} | blank for name, value in untrained.items()]
    for name in times:
        found = psnr(name)
        seeds = sorted(found.keys() & twin.keys())
        if not seeds:
            continue
        differences = [twin[s] - found[s] for s in seeds]
        error = f" ± {stdev(differences) / len(seeds) ** 0.5:.2f}" if len(seeds) > 1 and name != "supervised" else ""
        values = [runs[f"{key}, {name}, {s}"]["multipliers"] for s in seeds]
        row = {"problem": key, "loss": name, "seeds": len(seeds), "PSNR": f"{fmean(found.values()):.2f}"}
        row |= {"gap dB": f"{fmean(differences):.2f}{error}"}
        row |= {"closed %": f"{100 * (fmean(found.values()) - affine) / (best - affine):.0f}" if best > affine + 0.1 else "–"}
        row |= {column: f"{times[name][column]:.2f}" for column in SIZES}
        row |= {"multipliers": ", ".join(f"{fmean(v):.3g}" for v in list(zip(*values, strict=True))[:2])}
        rows.append(row)
    return rows


def complete(known: dict, key: str, problem: Problem, images: Tensor) -> None:
    """Compute what the record lacks of a problem."""
    held = Simulated(images[TRAINING:], problem.observe, SURVEY_SEED + 1)
    for part, make in (("untrained", untrained), ("seen", seen)):
        if key not in known[part]:
            known[part][key] = make(problem, images, held)
    if set(known["times"].get(key, ())) != set(problem.recipes):
        source = Simulated(images[:TRAINING], problem.observe, SURVEY_SEED)
        found = {column: step_times(problem, source, size) for column, size in SIZES.items()}
        known["times"][key] = {name: {column: found[column][name] for column in SIZES} for name in problem.recipes}


def write_tables(problems: dict[str, Problem], images: Tensor, record: Path, runs: Path, *, steps: int, command: str) -> None:
    """`selfsup_<images>` and `selfsup_<images>_seen`, and the record; what the record lacks is computed."""
    known = gather(record, runs, steps)
    rows, groups = [], []
    for key, problem in problems.items():
        complete(known, key, problem, images)
        record.write_text(json.dumps(known, indent=0, sort_keys=True, ensure_ascii=False) + "\n")
        peers = {name.removeprefix(f"{key}, "): v for name, v in known["peers"].items() if name.startswith(f"{key}, ")}
        times = {name: known["times"][key][name] for name in problem.recipes} | peers
        rows += gaps(problem, key, known["runs"], known["untrained"][key], times)
        for name, (alone, joint) in known["seen"][key].items():
            shares = {"seen alone %": f"{100 * alone:.1f}", "seen with it %": f"{100 * joint:.1f}"}
            groups.append({"problem": key, "with": name} | shares)
    stem = record.with_name(record.stem.removesuffix("_runs"))
    seeds = sorted({int(name.rsplit(", ", 1)[1]) for name in known["runs"]})
    titles = "; ".join(f"*{key}*: {problem.title}" for key, problem in problems.items())
    plan = f"{steps} steps of {BATCH} at a rate of {RATE:g}; {TRAINING} images, one measurement each; {HELD_OUT} others used."
    notes = f"{plan}\n\n{NOTES}\n\nProblems: {titles}."
    write_table(stem, f"B4: {stem.name}", rows, seeds=seeds, command=command, notes=notes)
    if groups:
        title = f"B4: what can be identified, {stem.name}"
        write_table(stem.with_name(stem.name + "_seen"), title, groups, seeds=[1], command=command, notes=SEEN)


NOTES = (
    "gap: PSNR of the supervised twin (same network, start, data, steps) less that of the row, mean over seeds ± its standard "
    "error. closed: of the way from the best affine reconstruction (told mean and covariance of the true images) to the twin. "
    "step: time of a training step over a supervised one's, the whole step as trained (48,020 parameters), and with a U-Net of "
    "the usual size (706,692). network's input: the linear inverse "
    "that the network starts from; an untrained network gives that."
)
SEEN = (
    "Share of image space with an eigenvalue of s² E[TᵀAᵀPAT] above 1, P the precision of the noise and s the rms spread of the "
    f"images; {ELEMENTS} elements of the group, or the operators of {MASKS} images."
)
