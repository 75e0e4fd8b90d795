"""Gradients to sizes, against float64."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kit import reference
from kit.drawn import given, settings, st
from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients import read as measure
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.select.scopes import Scopes

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, math.inf]
# Around the size above which a tensor is measured by rows, and with a last row that is not full.
COUNTS = [1, 7, 1000, 4096, 16383, 16384, 100_003]


def entries(count: int, seed: int = 0, spread: float = 0.2) -> Tensor:
    """Entries of both signs; their magnitudes are lognormal, like those of a gradient where `spread` is 2."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(count, generator=generator).sign()
    return signs * torch.exp(spread * torch.randn(count, generator=generator))


def parameter_norms(tensors: Sequence[Tensor | None], p: float) -> Tensor:
    """What a meter says of each tensor, the same when it has seen them before; and what it says of all together."""
    meter = Meter(p)
    norms = meter.each(tensors)
    for _ in range(2):
        assert torch.equal(meter.each(tensors), norms) or not torch.isfinite(norms).all()
        joint = meter.joint(tensors)
        assert joint is not None
        expected = pnorm.joint_norm(norms, p).item()
        assert joint == pytest.approx(expected, rel=1e-6) or (not math.isfinite(expected) and not math.isfinite(joint))
    return norms


def sparse_embedding(dtype: torch.dtype = torch.float32) -> Tensor:
    """An uncoalesced gradient of rows 1, 4 and 1 again."""
    values = torch.tensor([[1.0, 2.0], [3.0, -4.0], [-5.0, 6.0]], dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), values, (6, 2), check_invariants=True)


def sparse_without_entries() -> Tensor:
    return torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0, 2), (6, 2), check_invariants=True)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(-3.0),
    "channels-last": lambda: entries(8 * 6 * 20 * 20).view(8, 6, 20, 20).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: entries(200 * 100).view(200, 100).t(),
    "permuted": lambda: entries(20 * 30 * 40).view(20, 30, 40).permute(2, 0, 1),
    "every other column": lambda: entries(30 * 20).view(30, 20)[:, ::2],
    "a small slice": lambda: entries(60).view(6, 10)[1:3, 2:7],
    "expanded": lambda: entries(20).view(20, 1).expand(20, 15),
    "expanded from 0-d": lambda: torch.tensor(0.1).expand(3, 5),
    "a row of one": lambda: entries(20_000).view(1, 20_000, 1),
    "empty": lambda: torch.zeros(0, 3),
    "sparse": sparse_embedding,
    "sparse float64": lambda: sparse_embedding(torch.float64),
    "sparse without entries": sparse_without_entries,
    "complex": lambda: torch.complex(entries(500, 1), entries(500, 2)),
    "complex128": lambda: torch.complex(entries(500, 1).double(), entries(500, 2).double()),
    "large complex": lambda: torch.complex(entries(20_000, 1), entries(20_000, 2)),
    "conjugated": lambda: torch.complex(entries(500, 1), entries(500, 2)).conj(),
    "requires grad": lambda: entries(50).requires_grad_(),
}


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_norm_is_exact_to_1e6(count: int, dtype: torch.dtype, p: float) -> None:
    tensor = entries(count, spread=2.0).to(dtype)
    (norm,) = parameter_norms([tensor], p)
    assert norm.dtype == torch.float64
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert norm.item() == pytest.approx(reference.p_norm(reference.array(tensor), p), rel=rtol)


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("count", [1000, 16_383, 100_003])
def test_the_norm_of_equal_entries_is_exact_to_1e6(count: int, p: float) -> None:
    # Every addition rounds in the same direction: the worst case of a running float32 sum.
    tensor = torch.full((count,), 0.1)
    (norm,) = parameter_norms([tensor], p)
    assert norm.item() == pytest.approx(reference.p_norm(reference.array(tensor), p), rel=1e-6)


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_matter(layout: str, p: float) -> None:
    tensor = LAYOUTS[layout]()
    (norm,) = parameter_norms([tensor], p)
    # About which entries count; how exactly they are added is tested above.
    assert norm.item() == pytest.approx(reference.p_norm(reference.array(tensor), p), rel=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_twenty_million_entries_are_exact_to_1e6(p: float) -> None:
    # torch's float32 sum reads 0.5 % low here.
    tensor = torch.rand(20_000_000, generator=torch.Generator().manual_seed(0))
    (norm,) = parameter_norms([tensor], p)
    exact = torch.linalg.vector_norm(tensor, p, dtype=torch.float64).item()
    assert norm.item() == pytest.approx(exact, rel=1e-6)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda count: torch.full((count,), 0.7),
    "heavy tails": lambda count: entries(count, spread=2.0),
    "ascending": lambda count: entries(count, spread=2.0).abs().sort().values,
    "descending": lambda count: entries(count, spread=2.0).abs().sort(descending=True).values,
    # The large one leads the running sum of its row, to which all others then add with the same error.
    "one large entry in 512": lambda count: torch.full((count,), 0.7).index_fill(0, torch.arange(0, count, 512), 30.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 511, 513, 5000, 16_384, 99_991, 100_000, 2**20 + 1, 2**24])
def test_a_norm_is_exact_to_1e6_whatever_the_order_and_the_size(count: int, kind: str) -> None:
    tensor = KINDS[kind](count)
    exact = math.sqrt(sum(block.double().square().sum().item() for block in tensor.split(2**20)))
    assert parameter_norms([tensor], 2.0).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("layout", ["column", "rows of a wider matrix", "expanded"])
def test_a_large_tensor_that_is_not_contiguous_is_exact_to_1e6(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = {
        "column": lambda: torch.rand(4_000_000, 2, generator=generator)[:, 0],
        "rows of a wider matrix": lambda: torch.rand(2000, 4000, generator=generator)[:, :2000],
        "expanded": lambda: torch.rand(2000, generator=generator).view(-1, 1).expand(2000, 2000),
    }[layout]()
    exact = torch.linalg.vector_norm(tensor, 2.0, dtype=torch.float64).item()
    assert parameter_norms([tensor], 2.0).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize(
    "values",
    [
        [1e30, -1e30, 3e30],
        [1e20] * 5,
        [1e-25, 2e-25],
        [1e-30] * 20_000,
        [1e30, 1e-30],
        [1e38] * 1000,
        [3e38] * 50_000,
        [1e-42, 1e-42],
        [1e-45],
        [0.0, 1e-30],
    ],
    ids=lambda values: f"{values[0]:g} x {len(values)}",
)
def test_norms_beyond_the_range_of_float32(values: list[float], p: float) -> None:
    tensor = torch.tensor(values)
    (norm,) = parameter_norms([tensor], p)
    assert norm.item() == pytest.approx(reference.p_norm(reference.array(tensor), p), rel=1e-6)


@pytest.mark.parametrize("p", NORM_TYPES)
def test_a_float16_norm_above_65504_and_one_below_its_smallest(p: float) -> None:
    for scale in (2e4, 1e-7):
        tensor = (entries(500) * scale).half()
        assert torch.isfinite(tensor).all()
        (norm,) = parameter_norms([tensor], p)
        assert norm.item() == pytest.approx(reference.p_norm(reference.array(tensor), p), rel=1e-5)


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_norms_at_the_edge_of_float64(scale: float, p: float) -> None:
    tensors = [torch.full((3,), scale, dtype=torch.float64), torch.full((2,), 2 * scale, dtype=torch.float64)]
    norms = parameter_norms(tensors, p)
    expected = reference.joint_norm([reference.array(one) for one in tensors], p)
    assert pnorm.joint_norm(norms, p).item() == pytest.approx(expected, rel=1e-12)
    assert pnorm.scope_norms(norms, Scopes(("a",), (0, 0)), p).tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("p", NORM_TYPES)
def test_an_absent_gradient_counts_as_zero_in_its_place(p: float) -> None:
    tensors = [None, torch.tensor([2.0]), None, torch.zeros(3), torch.tensor([-3.0])]
    assert parameter_norms(tensors, p).tolist() == [0, 2, 0, 0, 3]
    assert measure.exact_norms(tensors, p).tolist() == [0, 2, 0, 0, 3]


@pytest.mark.parametrize("norms_of", [parameter_norms, measure.exact_norms])
def test_without_tensors_there_is_nothing_to_measure(norms_of: Callable[..., Tensor]) -> None:
    assert norms_of([], 2.0).tolist() == []
    assert norms_of([None, None], 2.0).tolist() == [0, 0]
    assert pnorm.joint_norm(norms_of([], 2.0), 2.0).item() == 0


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [3, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_non_finite_entry_shows_in_its_tensor_and_nowhere_else(
    dtype: torch.dtype, count: int, bad: float, p: float
) -> None:
    spoilt = torch.ones(count, dtype=dtype)
    spoilt[count // 2] = bad
    norms = parameter_norms([torch.ones(3), spoilt, torch.ones(3)], p)
    # The others are measured as ever.
    clean = reference.p_norm(np.ones(3), p)
    expected = math.nan if math.isnan(bad) else math.inf
    assert norms.tolist() == pytest.approx([clean, expected, clean], rel=1e-6, nan_ok=True)
    assert not torch.isfinite(pnorm.joint_norm(norms, p))
    by_scope = pnorm.scope_norms(norms, Scopes(("a", "b"), (0, 1, 0)), p)
    assert torch.isfinite(by_scope).tolist() == [True, False]


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_slow_norm_is_exact(layout: str, p: float) -> None:
    tensor = LAYOUTS[layout]()
    # The magnitude of a complex64 entry is a float32.
    rtol = 1e-7 if tensor.dtype == torch.complex64 else 1e-12
    expected = reference.p_norm(reference.array(tensor), p)
    assert measure.exact_norms([tensor], p).item() == pytest.approx(expected, rel=rtol)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("sparse")])
def test_measuring_writes_nothing(layout: str) -> None:
    tensor = LAYOUTS[layout]()
    before, version = tensor.detach().clone(), tensor._version
    for p in NORM_TYPES:
        parameter_norms([tensor], p)
        measure.exact_norms([tensor], p)
    assert torch.equal(tensor, before)
    assert tensor._version == version


def test_measuring_leaves_a_sparse_gradient_as_it_is() -> None:
    tensor = sparse_embedding()
    parameter_norms([tensor], 2.0)
    assert not tensor.is_coalesced()
    assert tensor._values().tolist() == [[1, 2], [3, -4], [-5, 6]]


@pytest.mark.parametrize("p", NORM_TYPES)
def test_a_norm_inside_its_range_is_not_suspect_and_one_outside_is(p: float) -> None:
    assert not pnorm.is_suspect(1.0, p)
    for norm in (math.inf, math.nan):
        assert pnorm.is_suspect(norm, p)
    assert pnorm.is_suspect(0.0, p) == (p != math.inf)


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_are_joined_by_scope(scale: float, p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(count, generator=generator) * scale for count in (3, 50, 1, 7, 20)]
    norms = parameter_norms(tensors, p)
    arrays = [reference.array(one) for one in tensors]
    scopes = Scopes.of(["a", "b", "a", "c", "b"])
    expected = [reference.joint_norm([arrays[i] for i in ones], p) for ones in ((0, 2), (1, 4), (3,))]
    assert pnorm.scope_norms(norms, scopes, p).tolist() == pytest.approx(expected, rel=1e-6)
    whole = reference.joint_norm(arrays, p)
    assert pnorm.joint_norm(norms, p).item() == pytest.approx(whole, rel=1e-6)
    assert pnorm.scope_norms(norms, Scopes.of(["all"] * 5), p).tolist() == pytest.approx([whole], rel=1e-6)


@pytest.mark.parametrize("p", NORM_TYPES)
def test_scopes_of_zeros_are_zero(p: float) -> None:
    norms = torch.zeros(3, dtype=torch.float64)
    for scopes in (Scopes.of(["a", "b", "a"]), Scopes.of(["a", "b", "c"]), Scopes.of(["a"] * 3)):
        assert pnorm.scope_norms(norms, scopes, p).tolist() == [0.0] * len(scopes.names)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    p=st.sampled_from(NORM_TYPES),
    parts=st.lists(
        st.tuples(st.integers(0, 40), st.floats(-30, 30), st.sampled_from([torch.float32, torch.float64])),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_tensors_of_any_scale_together(p: float, parts: list[tuple[int, float, torch.dtype]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (torch.randn(count, generator=generator, dtype=torch.float64) * 10**exponent).to(dtype)
        for count, exponent, dtype in parts
    ]
    norms = parameter_norms(tensors, p)
    arrays = [reference.array(one) for one in tensors]
    np.testing.assert_allclose(norms.numpy(), [reference.p_norm(one, p) for one in arrays], rtol=1e-6, atol=0)
    np.testing.assert_allclose(pnorm.joint_norm(norms, p).item(), reference.joint_norm(arrays, p), rtol=1e-6, atol=0)
