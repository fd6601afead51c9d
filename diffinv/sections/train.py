"""The sections of `diffinv train`: data, instrument, noise, loss, network and the training itself.

Every number is in the unit of the data, or of the image where it says so. Masks are True, or not 0, where a datum is good.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from diffinv.config import Count, Field, Number, Positive, Section, Seed, StampOrPath, positive_or
from diffinv.sections.terms import Losses, NotNegative

Widths = Annotated[tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...], Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]


class DataSection(Section):
    """What to learn from: `path`, or `callable` (module:function, without arguments).

    path: a directory of FITS files or a catalogue of them, an .npz, .h5 or .zarr. y, x, second, variance, mask, psf, uv: names
    of arrays in it: data, true images, a second exposure (same instrument and noise), σ² of the data, their mask, the PSF, the
    baselines in wavelengths. Of FITS files, y, x and second are extension names, and the others are where `diffinv sample`
    looks for them too; visibilities are not read from FITS. held_out: the
    share kept for validation, 0 for none. scale: what the network takes for 1, in the image's unit; auto: the median over
    images of their rms, back-projected; of a prior without the noise, over the pixels that data see.
    """

    path: Path | None = None
    callable: Annotated[str, Field(min_length=3)] | None = None
    y: str | None = None
    x: str | None = None
    second: str | None = None
    variance: str | None = None
    mask: str | None = None
    psf: str | None = None
    uv: str | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scale: positive_or("auto") = "auto"


class IdentityOperator(Section):
    """The data are the image."""

    kind: Literal["identity"]


class MaskOperator(Section):
    """Pixels that the mask leaves, of each image its own."""

    kind: Literal["mask"]


class ConvolutionOperator(Section):
    """A PSF, of the data or from `psf` (.npy, or FITS), on the image's pixels; data pixels are `factor` times larger."""

    kind: Literal["convolution"]
    border: Literal["zero", "reflecting"]
    psf: Path | None = None
    factor: Count = 1


class SumPoolOperator(Section):
    """Sums over factor × factor pixels of the image."""

    kind: Literal["sum_pool"]
    factor: Annotated[int, Field(ge=2)]


class FourierOperator(Section):
    """The orthonormal FFT where the mask (H, W) is True; data complex, or real and imaginary part on a last axis."""

    kind: Literal["masked_fourier"]


class VisibilitiesOperator(Section):
    """The Fourier sum at the (u, v) of data.uv: (M, 2), or that of each row; data complex (M), or a last axis of pairs.

    size: (H, W) of the image. step: radians a pixel along rows and columns, signed: with East to the left the second is < 0.
    """

    kind: Literal["visibilities"]
    size: tuple[Count, Count]
    step: tuple[Number, Number]


class RadonOperator(Section):
    """Parallel-beam projections (angles, detectors); angles: in degrees. size: (H, W) of the image."""

    kind: Literal["radon"]
    angles: Annotated[tuple[Number, ...], Field(min_length=1)]
    size: tuple[Count, Count]


Operators = Annotated[
    IdentityOperator
    | MaskOperator
    | ConvolutionOperator
    | SumPoolOperator
    | FourierOperator
    | VisibilitiesOperator
    | RadonOperator,
    Field(discriminator="kind"),
]


class GaussianNoise(Section):
    """White noise of `std`: a number, one a channel, `data` (from data.variance) or `auto` (estimated, and said so)."""

    kind: Literal["gaussian"]
    std: positive_or("auto", "data", several=True)


class CorrelatedNoise(Section):
    """Stationary Gaussian noise. white: share of the variance.

    correlation: odd stamp, 1 at its centre, as rows of numbers or in a file (.npy or FITS).
    """

    kind: Literal["correlated"]
    std: Positive
    correlation: StampOrPath
    white: Annotated[float, Field(ge=0, lt=1)]


class PoissonNoise(Section):
    """gain: counts per unit of the data. background: already subtracted."""

    kind: Literal["poisson"]
    gain: Positive
    background: NotNegative


class PoissonGaussianNoise(Section):
    """gain: electrons per unit of the data. read_noise: electrons. background: already subtracted."""

    kind: Literal["poisson_gaussian"]
    gain: Positive
    read_noise: Positive
    background: NotNegative


class GammaNoise(Section):
    """Speckle. floor: well below the faintest intensity that matters."""

    kind: Literal["gamma"]
    looks: Positive
    floor: Positive


class UnknownNoise(Section):
    """Independent between data, of a level that nobody knows: for losses that do not ask for it."""

    kind: Literal["unknown"]


Noises = Annotated[
    GaussianNoise | CorrelatedNoise | PoissonNoise | PoissonGaussianNoise | GammaNoise | UnknownNoise,
    Field(discriminator="kind"),
]


class BackProjectedNetwork(Section):
    """A U-Net on the back-projected data; with `iterations` and `damping`, on a regularised least-squares solution.

    filling: for masks, the width in pixels of the Gaussian that fills gaps from their neighbours, instead of leaving 0 there.
    """

    kind: Literal["backprojected"]
    widths: Widths = (32, 64, 96)
    blocks: Counts = (1, 1, 2)
    residual: bool = True
    iterations: Count | None = None
    damping: Positive | None = None
    filling: Positive | None = None


class UnrolledNetwork(Section):
    """Steps of descent, each followed by a U-Net; shared: one U-Net for all steps."""

    kind: Literal["unrolled"]
    iterations: Count
    widths: Widths = (32, 64, 96)
    blocks: Counts = (1, 1, 2)
    shared: bool = True


class BlindSpotNetwork(Section):
    """No pixel sees itself: for `measurement_consistency` on data that are the image."""

    kind: Literal["blind_spot"]
    width: Count = 48
    depth: Count = 8


class ScoreNetwork(Section):
    """For `noise2score`."""

    kind: Literal["score"]
    widths: Widths = (32, 64, 96)
    blocks: Counts = (1, 1, 2)


class BottleneckNetwork(Section):
    """An autoencoder of `latent` numbers on the back-projected data."""

    kind: Literal["bottleneck"]
    latent: Count
    widths: Counts = (32, 64, 96)


Networks = Annotated[
    BackProjectedNetwork | UnrolledNetwork | BlindSpotNetwork | ScoreNetwork | BottleneckNetwork, Field(discriminator="kind")
]


class IdentifiabilitySection(Section):
    """Which part of the images the data speak of, before the training.

    least_seen: share of image space that must be seen. allow_unidentifiable: train although it is not. signal: spread of the
    images in their unit; auto: the 99th percentile of their brightness, back-projected. rows, elements: measurements and
    transforms in the mean. noise_level: of a datum, where the noise is not Gaussian or its level unknown; auto: estimated.
    """

    least_seen: Annotated[float, Field(gt=0, le=1)] = 0.95
    allow_unidentifiable: bool = False
    signal: positive_or("auto") = "auto"
    noise_level: positive_or("auto") = "auto"
    rows: Annotated[int, Field(ge=1, le=1024)] = 16
    elements: Annotated[int, Field(ge=2, le=4096)] = 64


class TrainingSection(Section):
    """How long and how fast: the fields of `TrainingPlan`.

    multiplier_rate: of UNSURE's ascent, over the variance that it starts from; a number of 0.01 or so.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    warmup: Count = 200
    final_rate: Annotated[float, Field(ge=0, le=1)] = 0.02
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip: Positive = 1.0
    seed: Seed = 0
    save_every: Count = 500
    log_every: Count = 100
    deadline: Positive | None = None
    multiplier_rate: Positive | None = None
    multiplier_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    validate_every: Count = 500
    patience: Count = 10
    parts: Count = 1
    compiler: str = "no"
    precision: Literal["no", "bf16", "fp16"] = "no"
    trackers: tuple[str, ...] = ()


class TrainConfig(Section):
    """The configuration of `diffinv train`. operator and noise: not given where `data.callable` brings its own."""

    data: DataSection
    operator: Operators | None = None
    noise: Noises | None = None
    loss: Annotated[tuple[Losses, ...], Field(min_length=1)]
    network: Networks
    training: TrainingSection
    identifiability: IdentifiabilitySection = IdentifiabilitySection()

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as plain values."""
        return self.model_dump(mode="json")
