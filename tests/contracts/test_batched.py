"""Batches of objects, and the way from an object to a dictionary and back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffinv.core import registry
from diffinv.core.batched import Batched, collate
from diffinv.core.checks import ConfigError, ShapeError
from diffinv.operators.algebra import Chain, Compose, Diagonal, Identity, Sum
from diffinv.operators.border import ReflectingBorder, ZeroBorder
from diffinv.operators.convolution import Convolution
from diffinv.operators.detector import Arcsinh
from diffinv.operators.sampling import Crop, Mask, SumPool
from tests.cases.operators import draw, positive

SHAPE = (1, 4, 4)


@dataclass(frozen=True, eq=False)
class Indexed(Batched):
    """A batch of integers."""

    source: Tensor


def deep(batch: int = 3) -> Chain:
    """Parts of batch `batch`, a shared one, a boolean one, nested in tuples."""
    per_image = Diagonal(positive(batch, *SHAPE))
    shared = Diagonal(positive(1, *SHAPE, seed=2))
    mask = Mask(draw(batch, *SHAPE, seed=3) > 0)
    return Chain((Arcsinh(SHAPE, positive(batch)), Compose((mask, Sum((per_image, shared))))))


def test_tensors_are_found_however_deep():
    assert [tuple(t.shape) for t in deep().tensors()] == [(3,), (3, *SHAPE), (3, *SHAPE), (1, *SHAPE)]
    assert deep().batch == 3 and Identity(SHAPE).batch == 1


def test_map_makes_a_new_object_and_leaves_the_old_one():
    before = Diagonal(torch.ones(2, 3))
    after = before.map(lambda t: 2 * t)
    assert float(before.d.sum()) == 6 and float(after.d.sum()) == 12


def test_to_casts_numbers_and_leaves_masks():
    assert [t.dtype for t in deep().to(torch.float32).tensors()] == [torch.float32, torch.bool, torch.float32, torch.float32]


def test_to_a_short_format_leaves_large_indices_alone():
    source = torch.arange(100).roll(1)[None] + 5000
    moved = Indexed(source).to(torch.bfloat16)
    assert moved.source.dtype == torch.int64 and torch.equal(moved.source, source)


@pytest.mark.parametrize("index", [[2, 0], slice(1, 3), torch.tensor([0, 2, 2]), torch.tensor([True, False, True])])
def test_select_commutes_with_apply_and_shares_what_is_shared(index):
    operator, x = deep(), draw(3, *SHAPE)
    assert torch.equal(operator.select(index)(x[index]), operator(x)[index])
    assert operator.select(index).tensors()[-1].shape[0] == 1


def test_repeat_commutes_with_apply():
    operator, x = deep(), draw(3, *SHAPE)
    assert torch.equal(operator.repeat(2)(x.repeat_interleave(2, 0)), operator(x).repeat_interleave(2, 0))


def test_collate_undoes_select():
    operator, x = deep(), draw(3, *SHAPE)
    whole = collate([operator.select([0]), operator.select([1, 2])])
    assert torch.equal(whole(x), operator(x))
    assert whole.tensors()[-1].shape[0] == 1


def test_collate_spreads_a_field_that_only_some_share():
    one, two = Diagonal(positive(1, 3)), Diagonal(positive(2, 3, seed=1))
    x = draw(3, 3)
    assert torch.equal(collate([one, two])(x), torch.cat([one(x[:1]), two(x[1:])]))


def test_collate_repeats_a_shared_part_of_a_batched_object():
    """The parts of an item count with the item's batch, not with their own."""
    first = Sum((Diagonal(positive(2, 3)), Diagonal(positive(1, 3, seed=1))))
    second = Sum((Diagonal(positive(1, 3, seed=2)), Diagonal(positive(1, 3, seed=3))))
    x = draw(3, 3)
    whole = collate([first, second])
    assert torch.equal(whole(x), torch.cat([first(x[:2]), second(x[2:])]))


def blurred(channels: int, size: int, kernel: int, border: ZeroBorder | ReflectingBorder) -> Convolution:
    return Convolution(positive(1, 1, kernel, kernel), channels, (size, size), border)


@pytest.mark.parametrize(
    ("items", "word"),
    [
        ([Identity(SHAPE), Diagonal(positive(1, *SHAPE))], "mixed classes"),
        ([Identity(SHAPE), Identity((1, 5, 5))], "in_shape differs"),
        ([Diagonal(positive(1, 3)), Diagonal(positive(1, 4))], "has shapes"),
        ([blurred(1, 6, 3, ZeroBorder()), blurred(1, 6, 3, ReflectingBorder())], "border differs"),
        ([blurred(1, 6, 3, ZeroBorder()), blurred(1, 6, 5, ZeroBorder())], "has shapes"),
        ([Sum((Identity(SHAPE),)), Sum((Identity(SHAPE), Identity(SHAPE)))], "parts"),
        ([SumPool(SHAPE, 2), SumPool(SHAPE, 4)], "factor differs"),
    ],
)
def test_collate_refuses_what_does_not_fit(items, word):
    with pytest.raises(ShapeError, match=word):
        collate(items)


def test_round_trip_of_a_nested_object():
    operator, x = deep(), draw(3, *SHAPE)
    assert torch.equal(registry.from_dict(registry.to_dict(operator))(x), operator(x))


def test_the_dictionary_is_plain():
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (Tensor, str, int, float, bool))

    described = registry.to_dict(Compose((Crop(SHAPE, (0, 1), (2, 2)), blurred(1, 4, 3, ZeroBorder()))))
    assert plain(described)
    assert described["fields"]["operators"][1]["fields"]["border"] == {"kind": "border", "name": "zero", "fields": {}}


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ConfigError, match="did you mean convolution"):
        registry.lookup("operator", "convolutoin")


def test_a_name_is_given_once_and_only_registered_objects_are_described():
    with pytest.raises(ConfigError, match="already"):
        registry.register("operator", "identity")(Diagonal)

    @dataclass(frozen=True, eq=False)
    class Stranger(Batched):
        pass

    with pytest.raises(ConfigError, match="not registered"):
        registry.to_dict(Stranger())
