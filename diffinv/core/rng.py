"""Counter-based random streams: a draw depends on its key alone, never on its batch-mates, chunk, device order or worker.

Row i of a batch owns a 64-bit key made from (seed, image id, draw). Each call hashes (key, step, call counter within the
step, element index) with a SplitMix64 finaliser (Steele, Lea & Flood, *Fast splittable pseudorandom number generators*,
2014) on the device of the tensor, so no state lives on the host and none is shared between rows.
Normals are Box–Muller in float32 (float64 for float64 tensors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffinv.core.checks import ShapeError

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64 finaliser on int64 (wrapping arithmetic)."""
    z = z + _GOLDEN
    z.bitwise_xor_(_shift(z, 30)).mul_(_MIX1)
    z.bitwise_xor_(_shift(z, 27)).mul_(_MIX2)
    return z.bitwise_xor_(_shift(z, 31))


def _wrapped(value: int) -> int:
    """A Python integer modulo 2⁶⁴, as int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class Rng:
    """Random numbers for a batch, one independent stream a row.

    Arguments:
        keys: (B,) int64 keys, one a row; see `Rng.for_draws`.
    A call advances the counter, so that a program that makes the same calls gets the same numbers.
    """

    def __init__(self, keys: Tensor | Sequence[int]) -> None:
        self.keys = torch.as_tensor(keys, dtype=torch.int64)
        self._count = 0

    @classmethod
    def for_draws(cls, seed: int | Sequence[int], image_ids: Sequence[int] | Tensor, draws: int, first_draw: int = 0) -> Rng:
        """Streams for `draws` draws of each image, rows ordered as `Batched.repeat(draws)`.

        Arguments: seed: of all images, or one an image. image_ids: one integer an image (stable hash of its name). draws.
            first_draw: index of the first.
        """
        ids = torch.as_tensor(image_ids, dtype=torch.int64)
        base = _mix(_mix(torch.as_tensor(seed, dtype=torch.int64)) ^ ids)
        number = torch.arange(first_draw, first_draw + draws, dtype=torch.int64)
        return cls(_mix(base[:, None] ^ _mix(number)[None]).flatten())

    def __len__(self) -> int:
        return int(self.keys.shape[0])

    def to(self, device: torch.device | str) -> Rng:
        """The same streams with their keys on `device`."""
        moved = Rng(self.keys.to(device))
        moved._count = self._count
        return moved

    def select(self, index: Tensor | slice) -> Rng:
        """The streams of the rows `index`, at the same counter."""
        chosen = Rng(self.keys[index])
        chosen._count = self._count
        return chosen

    def spawn(self, key: int) -> Rng:
        """Independent streams named `key` (a step, a sub-algorithm); the parent's counter is untouched."""
        return Rng(_mix(self.keys ^ _mix(torch.tensor(int(key), dtype=torch.int64, device=self.keys.device) ^ _GOLDEN)))

    def _bits(self, like: Tensor, words: int) -> Tensor:
        """(words, B, *shape) uniformly distributed int64."""
        if like.shape[0] != len(self):
            raise ShapeError(f"Rng: {len(self)} streams but a batch of {like.shape[0]}; make one stream an image and draw.")
        if self.keys.device != like.device:
            self.keys = self.keys.to(like.device)
        counter = torch.arange(words * math.prod(like.shape[1:]), dtype=torch.int64, device=like.device)
        base = _mix(self.keys + _wrapped(self._count * _GOLDEN))
        self._count += 1
        bits = _mix(base[:, None] + counter * _GOLDEN)
        return bits.reshape(len(self), words, *like.shape[1:]).movedim(1, 0)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on (0, 1), the shape, dtype and device of `like` (B, …)."""
        return self._to_unit(self._bits(like, 1)[0], like.dtype)

    @staticmethod
    def _to_unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
        digits = 52 if dtype == torch.float64 else 23
        real = torch.float64 if dtype == torch.float64 else torch.float32
        return _shift(bits, 64 - digits).to(real).add_(0.5).mul_(2.0**-digits)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, the shape, dtype and device of `like` (B, …)."""
        if like.dtype == torch.float64:
            first, second = (self._to_unit(bits, like.dtype) for bits in self._bits(like, 2))
        else:
            bits = self._bits(like, 1)[0]
            first, second = self._to_unit(bits, like.dtype), self._to_unit(bits << 32, like.dtype)
        return first.log_().mul_(-2).sqrt_().mul_(second.mul_(2 * math.pi).cos_()).to(like.dtype)

    def rademacher(self, like: Tensor) -> Tensor:
        """±1 with probability ½ each."""
        return ((self._bits(like, 1)[0] & 1) * 2 - 1).to(like.dtype)

    def gamma(self, shape: Tensor) -> Tensor:
        """Gamma(shape, rate 1), one stream a row (host generators seeded by the row's key)."""
        return self._rowwise(shape, lambda s, g: torch._standard_gamma(s, generator=g))

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson(rate), elementwise."""
        return self._rowwise(rate, lambda r, g: torch.poisson(r, generator=g))

    def binomial(self, count: Tensor, p: float) -> Tensor:
        """Binomial(count, p), elementwise."""
        return self._rowwise(count, lambda n, g: torch.binomial(n, torch.full_like(n, p), generator=g))

    def beta(self, a: Tensor, b: Tensor) -> Tensor:
        """Beta(a, b), elementwise, from two gammas."""
        x = self.gamma(a)
        return x / (x + self.gamma(b))

    def _rowwise(self, parameter: Tensor, draw) -> Tensor:
        seeds = _mix(self.keys + _wrapped(self._count * _GOLDEN)).tolist()
        self._count += 1
        rows = []
        for row, seed in zip(parameter, seeds, strict=True):
            generator = torch.Generator(device=parameter.device).manual_seed(seed & ((1 << 63) - 1))
            rows.append(draw(row, generator))
        return torch.stack(rows)
