"""The contracts of batched objects and operators as plain functions, so that mutants can be shown to fail them.

Every function raises AssertionError when its claim is broken. Tolerances are relative to the size of what is compared,
in float64: sums of a few hundred terms round to 1e-14, so 1e-12 leaves room and catches any wrong factor or index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffinv.core import registry
from diffinv.core.batched import Batched, collate
from diffinv.core.checks import ShapeError
from diffinv.core.rng import Rng
from diffinv.operators.base import LinearOperator, Operator

EXACT = 1e-12
DIFFERENCE = 1e-7  # central difference at h = 1e-5: h² |f‴| + eps / h, both about 1e-10, times the size of f‴


def images(operator: Operator, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two random images that the operator takes."""
    return Rng.for_draws(seed, (0, 1), 1).normal(torch.zeros(2, *operator.in_shape, dtype=torch.float64)).to(dtype)


def data(operator: Operator, *, seed: int = 1) -> Tensor:
    """Two random data sets of the operator's output shape."""
    return Rng.for_draws(seed, (0, 1), 1).normal(torch.zeros(2, *operator.out_shape, dtype=torch.float64))


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """a = b to `tolerance` of the larger norm."""
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-300)
    error = float((a - b).abs().max()) / scale
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def declares_its_output_shape(operator: Operator) -> None:
    """apply: (B, *in_shape) → (B, *out_shape)."""
    assert tuple(operator(images(operator)).shape) == (2, *operator.out_shape)


def adjoint_is_exact(operator: LinearOperator) -> None:
    """⟨A x, y⟩ = ⟨x, Aᴴ y⟩ row by row, and `.H` is that adjoint."""
    x, y = images(operator), data(operator)
    ax, ahy = operator(x), operator.adjoint(y)
    left, right = (ax * y).flatten(1).sum(1), (x * ahy).flatten(1).sum(1)
    scale = ax.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
    assert bool(((left - right).abs() <= EXACT * scale.clamp_min(1e-300)).all()), f"⟨Ax, y⟩ = {left}, ⟨x, Aᴴy⟩ = {right}"
    close(operator.H(y), ahy, EXACT)
    close(operator.H.H(x), ax, EXACT)


def is_linear(operator: LinearOperator) -> None:
    """A(2x − 3x') = 2Ax − 3Ax'."""
    x, other = images(operator), images(operator, seed=5)
    close(operator(2 * x - 3 * other), 2 * operator(x) - 3 * operator(other), EXACT)


def equals_its_matrix(operator: LinearOperator) -> None:
    """Row by row: columns of the matrix are images of unit vectors, and the adjoint's matrix is the transpose."""
    x = images(operator)
    for row in range(2):
        one = operator.select([row])
        forward, backward = _matrix(one, one.in_shape), _matrix(one.H, one.out_shape)
        close(backward, forward.T, EXACT)
        close(operator(x)[row].flatten(), forward @ x[row].flatten(), EXACT)


def _matrix(operator: LinearOperator, shape: tuple[int, ...]) -> Tensor:
    size = int(torch.Size(shape).numel())
    return operator(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).T


def jacobian_is_the_derivative(operator: Operator) -> None:
    """linearize(x) = central finite difference, and its adjoint is exact."""
    x, direction, step = images(operator), images(operator, seed=5), 1e-5
    jacobian = operator.linearize(x)
    difference = (operator(x + step * direction) - operator(x - step * direction)) / (2 * step)
    close(jacobian(direction), difference, DIFFERENCE)
    adjoint_is_exact(jacobian)


def composes_with_torch_func(operator: Operator) -> None:
    """torch.func's jvp, vjp and vmap of `apply` agree with `linearize` and with one call at a time."""
    x, direction, y = images(operator), images(operator, seed=5), data(operator)
    jacobian = operator.linearize(x)
    close(torch.func.jvp(operator.apply, (x,), (direction,))[1], jacobian(direction), EXACT)
    close(torch.func.vjp(operator.apply, x)[1](y)[0], jacobian.adjoint(y), EXACT)
    close(torch.vmap(operator.apply)(torch.stack([x, direction])), torch.stack([operator(x), operator(direction)]), EXACT)


def row_alone_is_row_in_batch(operator: Operator) -> None:
    """Row i alone gives what it gives in the batch."""
    x = images(operator)
    for row in range(2):
        close(operator.select([row])(x[row : row + 1]), operator(x)[row : row + 1], EXACT)


def batch_maps_commute(operator: Operator) -> None:
    """select, repeat and collate commute with apply."""
    x = images(operator)
    y = operator(x)
    close(operator.select([1, 0])(x.flip(0)), y.flip(0), EXACT)
    close(operator.select(torch.tensor([True, False]))(x[:1]), y[:1], EXACT)
    close(operator.repeat(3)(x.repeat_interleave(3, 0)), y.repeat_interleave(3, 0), EXACT)
    close(collate([operator.select(slice(0, 1)), operator.select(slice(1, 2))])(x), y, EXACT)


def keeps_dtype(operator: Operator) -> None:
    """A float32 operator maps float32 to float32, near the float64 result, forth and back."""
    single = operator.to(torch.float32)
    x = images(operator, dtype=torch.float32)
    y, jacobian = single(x), single.linearize(x)
    assert y.dtype == torch.float32
    close(y.double(), operator(x.double()), 1e-4)
    assert jacobian.adjoint(y).dtype == torch.float32
    close(jacobian.adjoint(y).double(), operator.linearize(x.double()).adjoint(y.double()), 1e-4)


def keeps_device(operator: Operator) -> None:
    """On the meta device, which refuses to mix with the host, apply and adjoint make no constants elsewhere."""
    x, moved = images(operator).to("meta"), operator.to("meta")
    try:
        y = moved(x)
        back = moved.linearize(x).adjoint(y)
    except RuntimeError as error:
        raise AssertionError(f"two devices met: {error}") from error
    assert y.device.type == back.device.type == "meta"


def gradients_reach_fields(operator: Batched) -> None:
    """d/dε Σ w · A(x; fields + ε direction) by autograd equals its central difference, for each floating tensor field."""
    x = images(operator)
    weight = data(operator)
    count = sum(t.is_floating_point() for t in operator.tensors())
    for which in range(count):
        step = 1e-6
        plus, minus = (_moved(operator, which, sign * step) for sign in (1, -1))
        expected = ((plus(x) - minus(x)) * weight).sum() / (2 * step)
        amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = (_moved(operator, which, amount)(x) * weight).sum()
        assert value.requires_grad, f"no gradient reaches field {which}"
        (gradient,) = torch.autograd.grad(value, amount)
        close(gradient, expected, 1e-6)
        assert float(gradient.abs()) > 0, f"no gradient reaches field {which}"


def _moved(operator: Batched, which: int, amount: float | Tensor) -> Batched:
    counter = iter(range(len(operator.tensors())))

    def move(t: Tensor) -> Tensor:
        if not t.is_floating_point() or next(counter) != which:
            return t
        return t + amount * torch.cos(torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape)

    return operator.map(move)


def gradients_reach_leaves(operator: Batched) -> None:
    """A field that starts to ask for gradients after construction gets them."""
    leaves = [t for t in operator.tensors() if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    if leaves:
        gradients = torch.autograd.grad((operator(images(operator)) * data(operator)).sum(), leaves)
        assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradients)


def survives_the_dictionary(operator: Operator) -> None:
    """object → dict → object gives the same class and the same numbers."""
    back = registry.from_dict(registry.to_dict(operator))
    assert type(back) is type(operator)
    assert torch.equal(back(images(operator)), operator(images(operator)))


def refuses_a_wrong_shape(operator: Operator) -> None:
    """An image of another shape raises ShapeError, in one line that names the expectation."""
    wrong = torch.zeros(2, *operator.in_shape[:-1], operator.in_shape[-1] + 1, dtype=torch.float64)
    error = _shape_error(operator, wrong)
    assert str(tuple(operator.in_shape))[1:-1] in error and "\n" not in error, error


def refuses_a_wrong_batch(operator: Operator) -> None:
    """Three images for parameters of two raise ShapeError."""
    if operator.batch > 1:
        _shape_error(operator, torch.zeros(3, *operator.in_shape, dtype=torch.float64))


def _shape_error(operator: Operator, x: Tensor) -> str:
    try:
        operator(x)
    except ShapeError as error:
        return str(error)
    raise AssertionError(f"{type(operator).__name__} took {tuple(x.shape)}")
