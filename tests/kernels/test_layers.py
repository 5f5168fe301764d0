"""Attention, norms and whole layers of the native library agree with torch, and with each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from usmlite.kernels import ExpandedWeight, layers, native, reference
from usmlite.kernels.layers import Block, Decoder, Encoder, Norm

PATHS = native.paths()
pytestmark = pytest.mark.skipif(not PATHS, reason="installed without the native library")

# Queries, positions, heads, width of a head: odd ones, one of each, around blocks of 32 columns, 96 queries
# and 256 positions, and those of Whisper.
SHAPES = [
    (1, 1, 1, 1), (3, 7, 2, 12), (1, 33, 1, 5), (13, 31, 3, 33), (97, 257, 1, 8), (5, 300, 2, 64),
    (250, 1500, 2, 64),
]  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def split(x: Tensor, heads: int) -> Tensor:
    return x.view(len(x), heads, -1).transpose(0, 1)


def exact(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    parts = [split(x.double(), heads) for x in (query, key, value)]
    return scaled_dot_product_attention(*parts, scale=scale).transpose(0, 1).reshape(query.shape)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """On every path, which all give the same bits."""
    found = [layers.attention(query, key, value, heads, scale, path=path) for path in PATHS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)
    return found[0]


def off(found: Tensor, expected: Tensor) -> float:
    """The error's root mean square, relative to what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_attention(shape: tuple[int, int, int, int], sharpness: float) -> None:
    count, positions, heads, width = shape
    torch.manual_seed(0)
    query, key = torch.randn(count, heads * width), torch.randn(positions, heads * width)
    value = torch.randn(positions, heads * width) * torch.linspace(0.1, 30.0, heads * width) + 0.3
    scale = sharpness * width**-0.5
    expected = exact(query, key, value, heads, scale)
    assert off(attend(query, key, value, heads, scale), expected) < (0.02 if sharpness < 2 else 0.04)


def test_what_all_keys_have_in_common_does_not_matter() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 64), torch.randn(400, 64), torch.randn(400, 64)
    common = torch.zeros(64)
    common[7] = 500.0
    plain = attend(query, key, value, 2, 0.2)
    assert off(attend(query, key + common, value, 2, 0.2), plain.double()) < 0.02


def test_one_position_gets_all_the_weight() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(40, 24), torch.randn(1, 24), torch.randn(1, 24)
    torch.testing.assert_close(attend(query, key, value, 2, 1.0), value.expand(40, 24), rtol=1e-5, atol=1e-6)
    # Far above the others, and the last of its block or the first of the next.
    for place in (0, 255, 256, 599):
        key, value = torch.randn(600, 24), torch.randn(600, 24)
        key[place] = 40.0 * query[3]
        found = attend(query[3:4], key, value, 1, 1.0)
        step = value.abs().amax(dim=0) / 127
        assert bool(((found[0] - value[place]).abs() <= step / 2 + 1e-5).all())


def test_many_small_weights_are_not_lost() -> None:
    """A thousand positions of a thousandth of the largest weight are half of the outcome."""
    query = torch.ones(1, 16)
    key = torch.zeros(1280, 16)
    key[0] = 7.0 / 16
    value = torch.full((1280, 16), -1.0)
    value[0] = 1.0
    expected = exact(query, key, value, 1, 1.0)
    # Within the block of the largest, a fifth of them are below a step; the other four blocks are whole.
    assert float((attend(query, key, value, 1, 1.0) - expected).abs().max()) < 0.13


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_pass_for_a_number(bad: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(14, 20), torch.randn(300, 20), torch.randn(300, 20)
    wrong = query.clone()
    wrong[5, 3] = bad
    found = attend(wrong, key, value, 2, 1.0)
    assert bool(found[5, :10].isnan().all())
    assert torch.equal(found[5, 10:], attend(query, key, value, 2, 1.0)[5, 10:])
    for part in (key, value):
        changed = part.clone()
        changed[270, 4] = bad
        found = attend(query, changed if part is key else key, changed if part is value else value, 2, 1.0)
        assert bool(found[:, :10].isnan().all())
        assert bool(found[:, 10:].isfinite().all())


def test_zeros_and_extremes() -> None:
    zeros = torch.zeros(3, 8)
    assert torch.equal(attend(zeros, zeros, zeros, 2, 1.0), zeros)
    torch.manual_seed(0)
    value = torch.randn(50, 8)
    torch.testing.assert_close(
        attend(zeros, torch.zeros(50, 8), value, 2, 1.0), value.mean(dim=0).expand(3, 8), rtol=0, atol=0.01
    )
    for size in (1e-38, 1e-30, 1e30):
        found = attend(torch.randn(3, 8) * size, torch.randn(50, 8), torch.randn(50, 8), 2, 1.0)
        assert bool(found.isfinite().all())
    assert layers.attention(torch.empty(0, 8), zeros, zeros, 2, 1.0).shape == (0, 8)


def test_threads_make_no_difference() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(500, 128), torch.randn(700, 128), torch.randn(700, 128)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(layers.attention(query, key, value, 2, 0.1))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_attention_refuses_shapes() -> None:
    x = torch.randn(4, 12)
    for query, key, value, heads in (
        (x, x, x[:3], 2), (x, x[:, :8], x[:, :8], 2), (x, x, x, 5), (x, x, x, 0), (x, x[:0], x[:0], 2),
        (x[0], x, x, 2), (x[:, :0], x[:, :0], x[:, :0], 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"together|heads"):
            layers.attention(query, key, value, heads, 1.0)
    with pytest.raises(ValueError, match="float32"):
        layers.attention(x.double(), x, x, 2, 1.0)
    with pytest.raises(ValueError, match="no path 'abacus'"):
        layers.attention(x, x, x, 2, 1.0, path="abacus")


@pytest.mark.parametrize("path", PATHS)
def test_gelu(path: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_003), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    torch.testing.assert_close(layers.gelu(x.clone(), path=path), gelu(x), rtol=1e-6, atol=3e-6)
    assert bool(layers.gelu(torch.tensor([float("nan")]), path=path).isnan().all())
    assert layers.gelu(torch.empty(0), path=path).shape == (0,)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 5, 16, 24, 383, 384])
def test_normalize(path: str, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, width) * 20 + 100
    norm = Norm(torch.randn(width), torch.randn(width), 1e-5)
    expected = layer_norm(x.double(), (width,), norm.weight.double(), norm.bias.double(), 1e-5)
    torch.testing.assert_close(layers.normalize(x, norm, path=path), expected.float(), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="expected"):
        layers.normalize(x[..., : width - 1], norm)


# Whole layers, of random weights


def linear(rows: int, columns: int, *, bias: bool = True) -> tuple[native.NativeWeight, Tensor | None]:
    levels = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    weight = ExpandedWeight(
        levels, torch.rand(rows, 1) * 0.02 * columns**-0.5, None, torch.rand(columns) + 0.5
    )
    prepared = native.prepare(weight)
    assert prepared is not None
    return prepared, torch.randn(rows) * 0.1 if bias else None


def norm(width: int) -> Norm:
    return Norm(torch.rand(width) + 0.5, torch.randn(width) * 0.1, 1e-5)


def attention_block(width: int) -> Block:
    return Block(norm(width), tuple(linear(width, width, bias=place != 1) for place in range(4)))


def feed_block(width: int, wide: int) -> Block:
    return Block(norm(width), (linear(wide, width), linear(width, wide)))


def expected_norm(x: Tensor, norm: Norm) -> Tensor:
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)


def product(x: Tensor, parts: tuple[native.NativeWeight, Tensor | None]) -> Tensor:
    return reference.linear(x, parts[0].weight, parts[1])


def expected_attention(x: Tensor, block: Block, heads: int, heard: Tensor | None = None) -> Tensor:
    """What the block adds to x `[count, width]`, attending to all of x where `heard` is None."""
    normed = expected_norm(x, block.norm)
    source = normed if heard is None else heard
    query, key, value = (
        split(product(y, part), heads)
        for y, part in zip((normed, source, source), block.linears[:3], strict=True)
    )
    return product(
        scaled_dot_product_attention(query, key, value).transpose(0, 1).reshape(x.shape), block.linears[3]
    )


def expected_feed(x: Tensor, block: Block) -> Tensor:
    wide = gelu(product(expected_norm(x, block.norm), block.linears[0]))
    return product(wide, block.linears[1])


@pytest.mark.parametrize(
    ("positions", "width", "heads", "wide"), [(1, 4, 1, 7), (300, 24, 2, 40), (33, 64, 1, 128)]
)
def test_encoder(positions: int, width: int, heads: int, wide: int) -> None:
    torch.manual_seed(0)
    parts = [[attention_block(width), feed_block(width, wide)] for _ in range(2)]
    last = norm(width)
    x = torch.randn(2, positions, width)
    expected = []
    for window in x:
        for own, feed in parts:
            window = window + expected_attention(window, own, heads)
            window = window + expected_feed(window, feed)
        expected.append(expected_norm(window, last))
    found = Encoder(parts, last, heads)(x.clone())
    assert off(found, torch.stack(expected).double()) < 0.03
    torch.set_num_threads(3)
    assert torch.equal(Encoder(parts, last, heads)(x.clone()), found)


def decoder(width: int, heads: int, batch: int, positions: int) -> tuple[list[list[Block]], Norm, Tensor]:
    torch.manual_seed(0)
    parts = [[attention_block(width), attention_block(width), feed_block(width, 2 * width)] for _ in range(2)]
    return parts, norm(width), torch.randn(batch, positions, width)


def test_decoder() -> None:
    parts, last, encoded = decoder(24, 2, 3, 70)
    x = torch.randn(3, 9, 24)
    expected = []
    for window, heard in zip(x, encoded, strict=True):
        for own, cross, feed in parts:
            # One row after the other, each with those before it.
            added = [expected_attention(window[: i + 1], own, 2)[-1] for i in range(len(window))]
            window = window + torch.stack(added)
            window = window + expected_attention(window, cross, 2, heard)
            window = window + expected_feed(window, feed)
        expected.append(expected_norm(window, last))
    found = Decoder(parts, last, 2, encoded).step(x.clone())
    assert off(found, torch.stack(expected).double()) < 0.03


def test_steps_add_up() -> None:
    """Tokens one by one, in groups and at once give the same bits, with any threads and neighbours."""
    parts, last, encoded = decoder(32, 2, 3, 70)
    x = torch.randn(3, 100, 32)
    whole = Decoder(parts, last, 2, encoded).step(x.clone())
    for sizes, count in (([1] * 100, 1), ([64, 1, 35], 2), ([3, 97], 4)):
        torch.set_num_threads(count)
        session, found, first = Decoder(parts, last, 2, encoded), [], 0
        for size in sizes:
            found.append(session.step(x[:, first : first + size].clone()))
            first += size
        assert torch.equal(torch.cat(found, dim=1), whole)
    alone = Decoder(parts, last, 2, encoded[1:2].contiguous()).step(x[1:2].clone())
    assert torch.equal(alone[0], whole[1])


def test_sequences_leave_and_change_places() -> None:
    parts, last, encoded = decoder(24, 2, 3, 40)
    x = torch.randn(3, 6, 24)
    whole = Decoder(parts, last, 2, encoded).step(x.clone())
    session = Decoder(parts, last, 2, encoded)
    session.step(x[:, :2].clone())
    session.swap(0, 2)
    found = session.step(x[[2, 1], 2:4].clone())  # what was sequence 0 is gone
    assert torch.equal(found, whole[[2, 1], 2:4])
    found = session.step(x[2:3, 4:].clone())
    assert torch.equal(found, whole[2:3, 4:])
    for wrong in ((0, 1), (5, 0)):
        with pytest.raises(IndexError):
            session.swap(*wrong)


def test_sequences_are_selected() -> None:
    parts, last, encoded = decoder(24, 2, 2, 40)
    x = torch.randn(2, 2, 24)
    session = Decoder(parts, last, 2, encoded)
    session.step(x.clone())
    session.select([1, 1, 0, 1])
    more = torch.randn(4, 1, 24)
    found = session.step(more.clone())
    for row, origin in enumerate([1, 1, 0, 1]):
        alone = Decoder(parts, last, 2, encoded[origin : origin + 1].contiguous())
        alone.step(x[origin : origin + 1].clone())
        assert torch.equal(alone.step(more[row : row + 1].clone())[0], found[row])
    with pytest.raises(IndexError):
        session.select([0, 4])
    with pytest.raises(ValueError, match="so many"):
        session.step(torch.randn(5, 1, 24))


def test_layers_that_do_not_fit_are_refused() -> None:
    width = 24
    good = [attention_block(width), attention_block(width), feed_block(width, 30)]
    encoded = torch.randn(1, 5, width)
    for place, wrong in itertools.product(
        range(3), (attention_block(16), feed_block(16, 20), Block(norm(width), (linear(width, width),)))
    ):
        blocks = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(ValueError, match=r"."):
            Decoder([blocks], norm(width), 2, encoded)
        if place < 2:
            with pytest.raises(ValueError, match=r"."):
                Encoder([blocks[:2]], norm(width), 2)
    with pytest.raises(ValueError, match="heads"):
        Encoder([[good[0], good[2]]], norm(width), 5)
    with pytest.raises(ValueError, match="expected"):
        Decoder([good], norm(width), 2, encoded[..., :16].contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        Encoder([[good[0], good[2]]], norm(width), 2)(torch.randn(1, width, 9).transpose(1, 2))
    exact = native.prepare(good[0].linears[0][0].weight, "float32")
    assert exact is not None
    with pytest.raises(ValueError, match="rounded activations"):
        Encoder([[Block(norm(width), ((exact, None), *good[0].linears[1:])), good[2]]], norm(width), 2)
