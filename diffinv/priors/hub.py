"""diffusers' networks as denoisers. The only file that imports diffusers.

A variance-preserving model knows x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε. Divided by √ᾱ_t this is our x = x₀ + σ ε with
σ_t² = (1 − ᾱ_t)/ᾱ_t, so that x_t = x/√(1 + σ²), and t(σ) is read off the training grid, linearly in ln σ. What the network
predicts gives E[x₀ | x] (Salimans & Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, 2022, arXiv:2202.00512,
appendix D):

    epsilon:  D = x − σ ε        v_prediction:  D = √ᾱ x_t − √(1 − ᾱ) v        sample:  D = the output

Below the smallest trained level σ₀ the score of σ₀ is kept, D(x, σ) = x + (σ/σ₀)² (D(x, σ₀) − x): the images' density changes
no more at scales below σ₀. Above the largest there is no rule, and asking is an error.
Invariants: σ → 0 is the identity whatever the network; only local files are read, and only safetensors.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor, nn

from diffinv.core.checks import ConfigError, DiffinvError, InputError
from diffinv.core.linalg import expand
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser
from diffinv.priors.precondition import Preconditioned

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOISE_TO_TIMESTEP = 250.0  # ln σ / 4 spans about ±1.5, but the sinusoids of the time embedding are made for 0 … 1000

Prediction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x_t, output, √ᾱ, √(1 − ᾱ)) → E[x₀ | x_t]

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": lambda x_t, output, signal, noise: (x_t - noise * output) / signal,
    "v_prediction": lambda x_t, output, signal, noise: signal * x_t - noise * output,
    "sample": lambda x_t, output, signal, noise: output,
}


class TimestepNetwork(nn.Module):
    """A module with diffusers' interface, `model(x, timestep).sample`, as F(x (B, C, H, W), noise (B,)) → (B, C, H, W).

    Arguments: model. scale: timestep of a unit of noise.
    """

    def __init__(self, model: nn.Module, *, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.model(x, self.scale * noise).sample


class VariancePreserving(Denoiser):
    """A network trained on x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε, as E[x₀ | x₀ + σ z = x].

    Arguments:
        network: F(x_t (B, C, H, W), t (B,)) → (B, C, H, W), t fractional. betas: (T,) variances of the steps, 1 − ᾱ_t/ᾱ_{t−1};
        a last step of 1 (no signal left) is dropped. prediction: from the output to E[x₀ | x_t].
    Raises: DiffinvError when called at a σ above `sigma_max`.
    """

    def __init__(self, network: nn.Module, *, betas: Tensor, prediction: Prediction) -> None:
        super().__init__()
        self.network, self.prediction = network, prediction
        sigmas = torch.expm1(-torch.log1p(-betas.double()).cumsum(0)).sqrt()
        self.register_buffer("log_sigmas", sigmas[sigmas.isfinite()].log(), persistent=False)

    @property
    def sigma_min(self) -> float:
        """σ₀, the smallest trained level, in the unit of x."""
        return float(self.log_sigmas[0].exp())

    @property
    def sigma_max(self) -> float:
        """The largest trained level, in the unit of x."""
        return float(self.log_sigmas[-1].exp())

    def timestep(self, sigma: Sigma) -> Tensor:
        """t(σ), fractional, from ln σ on the training grid: (B,) float64."""
        grid, level = self.log_sigmas, sigma.double().log()
        above = torch.searchsorted(grid, level).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        return (above - 1 + (level - low) / (high - low)).clamp(0, len(grid) - 1)

    def forward(self, x: Image, sigma: Sigma) -> Image:
        if bool((sigma.double() > self.sigma_max * (1 + 1e-5)).any()):
            raise DiffinvError(
                f"VariancePreserving: sigma {float(sigma.max()):.6g} is above the largest trained level {self.sigma_max:.6g}; "
                "start the schedule there."
            )
        trained = sigma.double().clamp_min(self.sigma_min)
        signal = (1 + trained**2).rsqrt()
        x_t = expand(signal, x) * x
        output = self.network(x_t, self.timestep(trained).to(x.dtype))
        mean = self.prediction(x_t, output.to(x.dtype), expand(signal, x), expand(trained * signal, x))
        return torch.lerp(x, mean, expand((sigma.double() / trained) ** 2, x).expand_as(x))


def denoiser_from_unet2d(config: Mapping[str, Any], *, sigma_data: float) -> Preconditioned:
    """An untrained denoiser: EDM's preconditioning around a new `UNet2DModel`.

    Arguments: config: arguments of `diffusers.UNet2DModel`; in_channels and out_channels must be given and equal.
        sigma_data: σ_d, standard deviation of the training images, in their unit.
    Raises: ConfigError on an unknown or impossible argument.
    """
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    for name in set(config) - known:
        near = difflib.get_close_matches(name, known, 1)
        raise ConfigError(f"UNet2DModel: unknown argument {name!r}" + (f" (did you mean {near[0]}?)." if near else "."))
    channels = (config.get("in_channels"), config.get("out_channels"))
    if channels[0] is None or channels[0] != channels[1]:
        raise ConfigError(f"UNet2DModel: in_channels and out_channels are {channels}; give the channels of the image for both.")
    try:
        model = UNet2DModel(**config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"UNet2DModel: {_one_line(error)}") from error
    _check_conditioning("UNet2DModel", model)
    return Preconditioned(TimestepNetwork(model, scale=NOISE_TO_TIMESTEP), sigma_data=sigma_data)


def load_diffusers(folder: str | Path, *, device: torch.device | str = "cpu") -> VariancePreserving:
    """The denoiser of a diffusers model in a local folder.

    Arguments:
        folder: of a pipeline (`unet/`, `scheduler/`), or of a model (`config.json`, `diffusion_pytorch_model.safetensors`)
        that also holds `scheduler_config.json`. The scheduler's noise levels and `prediction_type` are used (absent:
        epsilon, as diffusers reads it); `clip_sample` and `thresholding` are not, for a posterior mean is not clipped.
    Returns: the denoiser, in the unit of the images that it was trained on (often [−1, 1]), with gradients off.
    Raises: InputError, one line, when a file is missing, pickled, truncated, of another architecture, or not
        variance preserving.
    """
    folder = Path(folder)
    root = folder / "unet" if (folder / "unet").is_dir() else folder
    betas, prediction = _read_scheduler(folder)
    model = _read_unet(root)
    denoiser = VariancePreserving(TimestepNetwork(model), betas=betas, prediction=prediction)
    return denoiser.to(device).eval().requires_grad_(False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a folder written by diffusers' save_pretrained.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({_one_line(error)}); fetch the model again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__} instead of keys; fetch the model again.")
    return content


def _read_scheduler(folder: Path) -> tuple[Tensor, Prediction]:
    """(T,) betas and the prediction of the folder's scheduler."""
    inner = folder / "scheduler" / "scheduler_config.json"
    path = inner if inner.is_file() else folder / "scheduler_config.json"
    config = _read_json(path)
    if "beta_schedule" not in config:
        name = config.get("_class_name", "the scheduler")
        raise InputError(
            f"{path}: {name} has no beta_schedule; only variance-preserving models (DDPM and its kin) can be loaded."
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise InputError(f"{path}: prediction_type is {kind!r}; it must be one of {', '.join(PREDICTIONS)}.")
    try:
        scheduler = DDPMScheduler.from_config(config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{path}: no noise levels can be made from it ({_one_line(error)}).") from error
    return scheduler.betas, PREDICTIONS[kind]


def _read_unet(root: Path) -> UNet2DModel:
    name = _read_json(root / "config.json").get("_class_name")
    if name != "UNet2DModel":
        raise InputError(f"{root / 'config.json'}: the model is {name}; only unconditional UNet2DModel networks can be loaded.")
    if not (root / WEIGHTS).is_file():
        pickled = ", ".join(sorted(p.name for p in root.glob("*.bin")))
        reason = f"only pickled weights ({pickled}), which can run code and are never read" if pickled else "no weights"
        raise InputError(f"{root}: {reason}; it must hold {WEIGHTS} (save_pretrained with safe_serialization).")
    try:
        model, report = UNet2DModel.from_pretrained(
            root, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{root / WEIGHTS}: cannot be loaded ({_one_line(error)}); fetch the model again.") from error
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]})
    if wrong:
        raise InputError(
            f"{root / WEIGHTS}: {len(wrong)} weights do not fit config.json, {wrong[0]} first; fetch the model again."
        )
    _check_conditioning(str(root), model)
    return model


def _check_conditioning(owner: str, model: UNet2DModel) -> None:
    """Refuse networks that need more than an image and a fractional timestep, or give more than an image."""
    config = model.config
    if config.time_embedding_type != "positional":
        raise InputError(
            f"{owner}: time_embedding_type {config.time_embedding_type} takes no fractional timestep; use positional."
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise InputError(f"{owner}: the network is conditioned on classes; only unconditional networks are priors here.")
    if config.in_channels != config.out_channels:
        raise InputError(
            f"{owner}: {config.in_channels} channels in but {config.out_channels} out; a learned variance is not supported."
        )


def _one_line(error: Exception, length: int = 160) -> str:
    return " ".join(str(error).split())[:length]
