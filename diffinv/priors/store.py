"""Priors on disk: one safetensors file that holds weights, architecture and card. Pickles are never read.

Invariant: `load_prior(save_prior(...))` gives the same denoiser up to the stored precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffinv.core.checks import InputError, check_weights
from diffinv.core.types import Image, Sigma
from diffinv.priors.base import Denoiser
from diffinv.priors.precondition import Autocast, HighDynamicRange, Preconditioned
from diffinv.priors.unet import UNet

_VARIANCE = "card.variance"
_STRETCH = 1.25  # a wider field is not as good as tiles, or may not be: benchmarks/wide_fields.md
SHIPPED = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class PriorCard:
    """What a prior is a prior of.

    bands: ("grey",) for a prior used band by band. size: field in pixels. pixel_scale: arcsec. target_fwhm: arcsec,
    Gaussian PSF of its images. sigma_data: σ_d. sigma_min, sigma_max: range of trained noise levels, in units of the
    image's scale (rms over the field). training: data, seeds, steps, hardware, in words.
    """

    name: str
    bands: tuple[str, ...]
    size: int
    pixel_scale: float
    target_fwhm: float
    sigma_data: float
    sigma_min: float
    sigma_max: float
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    training: str

    @property
    def stride(self) -> int:
        """Sides of what the network sees are multiples of it: the stem halves them, as does every level."""
        return 2 ** len(self.widths)

    def sees(self, shape: Sequence[int]) -> bool:
        """Whether one pass of the network, which is convolutional, answers for a whole field (…, H, W) about as well as tiles do
        (MSE within .4 % for one band, 2 % for three: benchmarks/wide_fields.md)."""
        return all(n == self.size or (n % self.stride == 0 and self.size < n <= _STRETCH * self.size) for n in shape[-2:])


class Prior(Denoiser):
    """A trained denoiser with its card, the digest of its weights and the variance of its images.

    variance: (1, C, size, size), of the training views a pixel, in units of the image's scale squared.
    """

    def __init__(self, denoiser: Denoiser, card: PriorCard, digest: str, variance: Tensor) -> None:
        super().__init__()
        self.denoiser, self.card, self.digest = denoiser, card, digest
        self.register_buffer("variance", variance)

    def forward(self, x: Image, sigma: Sigma) -> Image:
        return self.denoiser(x, sigma)


def build_denoiser(card: PriorCard, dtype: torch.dtype = torch.float32) -> Preconditioned:
    """The untrained denoiser of a card; `dtype` is that of the network's arithmetic (autocast), not of its interface."""
    channels = len(card.bands)
    network: nn.Module = UNet(3 * channels, 2 * channels, widths=card.widths, blocks=card.blocks)
    network = network.to(memory_format=torch.channels_last)
    inner = Autocast(network, dtype) if dtype != torch.float32 else network
    return Preconditioned(HighDynamicRange(inner, sigma_data=card.sigma_data), sigma_data=card.sigma_data)


def network_of(denoiser: Preconditioned) -> nn.Module:
    """The U-Net inside a denoiser of `build_denoiser`, whatever the precision of its arithmetic; a file holds its state."""
    inner = denoiser.network.network
    return inner.network if isinstance(inner, Autocast) else inner


def save_prior(
    path: Path, denoiser: Preconditioned, card: PriorCard, *, variance: Tensor, precision: torch.dtype = torch.float16
) -> None:
    """Write weights (in `precision`), card and the variance map (1, C, size, size) of its images to one safetensors file."""
    state = {name: t.detach().to(precision).contiguous() for name, t in network_of(denoiser).state_dict().items()}
    state[_VARIANCE] = variance.float().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"card": json.dumps(asdict(card))})


def load_prior(name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Prior:
    """A prior by its shipped name or by the path of its safetensors file.

    Arguments: name: "galaxies-64" or a path. device. dtype: float32, or bfloat16 for autocast arithmetic in the network.
    Raises: InputError when there is no such prior, or the file is not safetensors, truncated, or of another architecture.
    """
    path = Path(name)
    if not path.suffix:
        path = SHIPPED / f"{name}.safetensors"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors"))) or "none"
        raise InputError(f"prior '{name}': no such file; shipped priors: {shipped}; or give the path of a .safetensors file.")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: weights must be a .safetensors file (pickled weights can run code and are never read).")
    try:
        with safe_open(path, "pt") as handle:
            card = _parse_card(path, (handle.metadata() or {}).get("card"))
            state = {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); fetch or train it again.") from error
    check_weights(str(path), state)
    shape = (1, len(card.bands), card.size, card.size)
    variance = state.pop(_VARIANCE, None)
    if variance is None or tuple(variance.shape) != shape:
        raise InputError(f"{path}: holds no variance map of shape {shape}; write it with diffinv.priors.store.save_prior.")
    try:
        denoiser = build_denoiser(card, dtype)
        network_of(denoiser).load_state_dict(state)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: the weights do not fit the architecture on its card ({reason}).") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Prior(denoiser, card, digest, variance).to(device).eval().requires_grad_(False)


def _parse_card(path: Path, text: str | None) -> PriorCard:
    if text is None:
        raise InputError(f"{path}: has no prior card in its metadata; write it with diffinv.priors.store.save_prior.")
    try:
        fields = json.loads(text)
        lists = {key: tuple(fields[key]) for key in ("bands", "widths", "blocks")}
        return PriorCard(**{**fields, **lists})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: its prior card cannot be read ({error}); write it with save_prior.") from error
