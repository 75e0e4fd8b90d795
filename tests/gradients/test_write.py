"""The only writes to gradients."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from kit import peers, reference
from kit.gradients import Witness, named, same_bits
from lightning_gradclip.gradients import write

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def holding(*gradients: Tensor | None) -> list[Parameter]:
    return [parameter for _, parameter in named({str(i): gradient for i, gradient in enumerate(gradients)})]


def coefs(*values: float) -> list[Tensor]:
    return list(torch.tensor(values, dtype=torch.float64).unbind())


def scale_(parameters: Sequence[Parameter], coefs: Sequence[Tensor]) -> None:
    """Multiply each gradient by its own coefficient, or where all are one all by it."""
    if coefs and all(one is coefs[0] for one in coefs):
        write.ScaleAll(coefs[0]).apply(parameters)
    else:
        write.Scale(torch.stack(list(coefs)) if coefs else torch.ones(0), range(len(coefs))).apply(parameters)


def assert_exact(gradient: Tensor, exact: np.ndarray) -> None:
    """Half gradients to one unit in the last place; others to a few roundings of coefficient and product."""
    if gradient.dtype in (torch.float16, torch.bfloat16):
        assert (np.abs(reference.array(gradient) - exact) <= reference.ulp(exact, gradient.dtype)).all()
        return
    rtol = 1e-15 if gradient.dtype in (torch.float64, torch.complex128) else 4e-7
    np.testing.assert_allclose(reference.array(gradient), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coef", [0.1, 1e-3, 0.999, 7.3, 1e-7])
@pytest.mark.parametrize("shared", [True, False])
def test_every_entry_is_multiplied(dtype: torch.dtype, coef: float, shared: bool) -> None:
    parameters = holding(random(5, 3, dtype=dtype), random(40, dtype=dtype, seed=1))
    exact = [reference.array(parameter.grad) * coef for parameter in parameters]
    scale_(parameters, coefs(coef) * 2 if shared else coefs(coef, coef))
    for parameter, expected in zip(parameters, exact, strict=True):
        assert_exact(parameter.grad, expected)


@pytest.mark.parametrize(
    ("entry", "coef"),
    [(3e38, 1e-39), (3e38, 3.3e-42), (3e38, 1e-60), (1e-42, 1e41), (1e-45, 1e44), (1e30, 1e-45)],
)
def test_a_coefficient_outside_the_range_of_float32_keeps_its_digits(entry: float, coef: float) -> None:
    (parameter,) = holding(torch.full((3,), entry))
    exact = reference.array(parameter.grad) * coef
    scale_([parameter], coefs(coef))
    assert_exact(parameter.grad, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coef", [0.1, 7.3, 1e-7, 0.0])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_number_multiplies_all(dtype: torch.dtype, coef: float, count: int) -> None:
    parameters = holding(*(random(3, 2, dtype=dtype, seed=i) for i in range(count)), None)
    exact = [reference.array(parameter.grad) * coef for parameter in parameters[:-1]]
    versions = [parameter.grad._version for parameter in parameters[:-1]]
    write.ScaleAll(coef).apply(parameters)
    for parameter, expected, version in zip(parameters, exact, versions, strict=False):
        assert_exact(parameter.grad, expected)
        assert parameter.grad._version > version
    assert parameters[-1].grad is None


def test_float64_gradients_are_scaled_in_float64() -> None:
    parameters = holding(random(9, dtype=torch.float64), random(9))
    exact = reference.array(parameters[0].grad) * 0.1
    scale_(parameters, coefs(0.1) * 2)
    np.testing.assert_allclose(reference.array(parameters[0].grad), exact, rtol=1e-15, atol=0)


def test_each_parameter_gets_its_own_coefficient_whatever_its_dtype() -> None:
    parameters = holding(*(random(4, dtype=dtype, seed=i) for i, dtype in enumerate(DTYPES)))
    values = [0.5, 0.25, 2.0, 0.125, 4.0, 0.0625]
    # Powers of two: exact in every dtype.
    expected = [parameter.grad * value for parameter, value in zip(parameters, values, strict=True)]
    scale_(parameters, coefs(*values))
    for parameter, one in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, one)


def test_scaling_writes_in_place_and_skips_absent_gradients() -> None:
    gradient = torch.tensor([2.0, -4.0])
    parameters = holding(None, gradient, None)
    scale_(parameters, coefs(0.1, 0.5, 0.1))
    assert parameters[1].grad is gradient
    assert gradient.tolist() == [1.0, -2.0]
    assert parameters[0].grad is None
    assert parameters[2].grad is None


def test_scaling_nothing_does_nothing() -> None:
    scale_([], [])
    parameters = holding(None, torch.zeros(0, 3))
    scale_(parameters, coefs(0.5, 0.5))
    assert parameters[0].grad is None
    assert parameters[1].grad.shape == (0, 3)


def test_a_zero_coefficient_gives_zeros() -> None:
    (parameter,) = holding(random(4))
    scale_([parameter], coefs(0.0))
    assert parameter.grad.tolist() == [0, 0, 0, 0]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels-last": lambda: random(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: random(4, 6).t(),
    "every other column": lambda: random(4, 6)[:, ::2],
    "every other row": lambda: random(8, 3)[::2],
    "0-d": lambda: torch.tensor(3.0),
    "conjugated": lambda: random(4, 3, dtype=torch.complex64).conj(),
    # As the imaginary part of a conjugated tensor, but contiguous.
    "negated": lambda: torch._neg_view(random(4, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", [0, 2])
def test_layouts_are_kept(layout: str, others: int) -> None:
    parameters = holding(LAYOUTS[layout](), *(random(3, seed=i) for i in range(others)))
    exact = [reference.array(parameter.grad) * 0.3 for parameter in parameters]
    strides = parameters[0].grad.stride()
    scale_(parameters, coefs(*[0.3] * len(parameters)))
    assert parameters[0].grad.stride() == strides
    for parameter, expected in zip(parameters, exact, strict=True):
        assert_exact(parameter.grad, expected)


def test_gradients_that_autograd_leaves_conjugated_are_scaled_and_masked() -> None:
    parameters = [Parameter(random(4, 3, dtype=torch.complex64, seed=i)) for i in range(2)]
    (parameters[0].conj() * parameters[1]).real.sum().backward()
    assert any(parameter.grad.is_conj() for parameter in parameters)
    exact = [reference.array(parameter.grad) * 0.3 for parameter in parameters]
    scale_(parameters, coefs(0.3, 0.3))
    for parameter, expected in zip(parameters, exact, strict=True):
        assert_exact(parameter.grad, expected)
    for parameter in parameters:
        scale_slices_(parameter, torch.tensor([0.5, 1.0, 0.25, 0.125]))
        parameter.grad[1, 1] = math.nan
    write.zero_nonfinite_(parameters)
    factors = np.array([[0.5], [1.0], [0.25], [0.125]])
    for parameter, expected in zip(parameters, exact, strict=True):
        expected[1, 1] = 0
        assert_exact(parameter.grad, expected * factors)


def test_only_the_slice_is_written() -> None:
    whole = torch.ones(4, 6)
    (parameter,) = holding(whole[:, ::2])
    scale_([parameter], coefs(0.5))
    assert whole.tolist() == [[0.5, 1.0] * 3] * 4


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_an_expanded_gradient_is_scaled_once(shape: tuple[int, ...]) -> None:
    # What `parameter.grad, = torch.autograd.grad(parameter.sum(), parameter)` leaves: one number in memory.
    (parameter,) = holding(torch.tensor(2.0).expand(shape))
    scale_([parameter], coefs(0.25))
    assert torch.equal(parameter.grad, torch.full(shape, 0.5))


def test_an_expanded_gradient_is_masked() -> None:
    (parameter,) = holding(torch.tensor([[math.nan], [1.0]]).expand(2, 3))
    write.zero_nonfinite_([parameter])
    assert parameter.grad.tolist() == [[0, 0, 0], [1, 1, 1]]


def uncoalesced(*values: list[float]) -> Tensor:
    """Values for the rows 1, 4 and 1 again."""
    return torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), torch.tensor(values), (6, 2), check_invariants=True)


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_gradient_is_scaled_as_the_sum_it_stands_for(coalesced: bool) -> None:
    gradient = uncoalesced([1.0, 2.0], [3.0, -4.0], [-5.0, 6.0])
    (parameter,) = holding(gradient.coalesce() if coalesced else gradient)
    scale_([parameter], coefs(0.5))
    assert parameter.grad.is_sparse
    assert parameter.grad.to_dense().tolist() == [[0, 0], [-2, 4], [0, 0], [0, 0], [1.5, -2], [0, 0]]


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scale_slices_(parameter: Parameter, factors: Tensor) -> None:
    write.ScaleUnits(factors, [len(factors)]).apply([parameter])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 7), (4, 1), (4, 3, 2, 2), (4, 2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("coefs_dtype", [torch.float32, torch.float64], ids=str)
def test_every_slice_is_multiplied_by_its_own_coefficient(
    dtype: torch.dtype, shape: tuple[int, ...], coefs_dtype: torch.dtype
) -> None:
    (parameter,) = holding(random(*shape, dtype=dtype))
    before = parameter.grad.clone()
    factors = rows(0.1, 1.0, 1e-7, 7.3).to(coefs_dtype)
    exact = reference.array(before) * factors.double().view(-1, *[1] * (len(shape) - 1)).numpy()
    scale_slices_(parameter, factors)
    assert parameter.grad.dtype == dtype
    assert_exact(parameter.grad, exact)
    assert same_bits(parameter.grad[1], before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 40, 300])
def test_the_slices_of_a_large_gradient_are_those_of_one_product(
    count: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    # Whether a few slices change, or many of them.
    gradient = random(320, 512, 2, 2, dtype=dtype).to(memory_format=layout)
    gradient[5, 0, 0, 0] = -0.0
    chosen = torch.randperm(320, generator=torch.Generator().manual_seed(1))[:count]
    factors = torch.ones(320).index_fill(0, chosen, 0.3)
    expected = gradient * factors.view(-1, 1, 1, 1)
    (parameter,) = holding(gradient.clone())
    (other,) = holding(random(4, 6))
    write.ScaleUnits(torch.cat((torch.ones(4), factors)), [4, 320]).apply([other, parameter])
    assert same_bits(parameter.grad, expected.to(dtype))
    assert parameter.grad.stride() == gradient.stride()
    assert (parameter.grad._version > 0) == (count > 0)
    assert other.grad._version == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_whose_coefficient_is_1_keeps_its_bits(dtype: torch.dtype) -> None:
    part = [-0.0, 0.0, 6e-8, math.inf, 1.5]
    values = [complex(-0.0, -1.0), complex(math.inf, 1.0), complex(1.0, -0.0), *part] if dtype.is_complex else part
    gradient = torch.tensor([values, values], dtype=dtype)
    (parameter,) = holding(gradient.clone())
    for factors in (rows(1.0, 0.5), rows(1.0, 1e-42)):
        scale_slices_(parameter, factors)
        assert same_bits(parameter.grad[0], gradient[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("entry", "coef"), [(3e38, 1e-39), (3e38, 3.3e-42), (3e38, 1e-60), (1e-42, 1e41), (1e-45, 1e44), (1e30, 1e-45)]
)
def test_coefficients_of_slices_outside_the_range_of_float32_keep_their_digits(
    dtype: torch.dtype, entry: float, coef: float
) -> None:
    # Beside them ordinary coefficients, which lose nothing.
    gradient = torch.cat((torch.full((2, 5), entry, dtype=dtype), random(60, 5).to(dtype)))
    (parameter,) = holding(gradient.clone())
    factors = torch.cat((rows(coef, 1.0), torch.rand(60, generator=torch.Generator().manual_seed(1)).double()))
    exact = reference.array(gradient) * factors[:, None].numpy()
    scale_slices_(parameter, factors)
    assert same_bits(parameter.grad[1], gradient[1])
    assert_exact(parameter.grad, exact)


def test_half_gradients_keep_their_digits_under_coefficients_outside_the_range_of_float32() -> None:
    gradient = (random(4000) * 5e37).bfloat16()
    (parameter,) = holding(gradient.clone())
    scale_([parameter], coefs(4e-40))
    assert_exact(parameter.grad, reference.array(gradient) * 4e-40)


@pytest.mark.parametrize(
    "layout", ["channels-last", "transposed", "every other column", "every other row", "conjugated", "negated"]
)
def test_layouts_of_slices_are_kept(layout: str) -> None:
    (parameter,) = holding(LAYOUTS[layout]())
    strides, before = parameter.grad.stride(), reference.array(parameter.grad).copy()
    factors = 0.1 + torch.arange(len(before), dtype=torch.float64)
    scale_slices_(parameter, factors)
    assert parameter.grad.stride() == strides
    assert_exact(parameter.grad, before * factors.view(-1, *[1] * (before.ndim - 1)).numpy())


def test_slices_are_written_in_place_and_only_they() -> None:
    whole = torch.ones(4, 6)
    gradient = whole[:, ::2]
    (parameter,) = holding(gradient)
    scale_slices_(parameter, rows(0.5, 1.0, 0.25, 2.0))
    assert parameter.grad is gradient
    assert whole.tolist() == [[c, 1.0] * 3 for c in (0.5, 1.0, 0.25, 2.0)]


@pytest.mark.parametrize(
    ("value", "shape"),
    [(torch.tensor(2.0), (3, 4)), (torch.tensor([[2.0], [4.0], [8.0]]), (3, 4)), (torch.ones(4), (3, 4))],
)
def test_the_slices_of_an_expanded_gradient_are_scaled_once(value: Tensor, shape: tuple[int, ...]) -> None:
    (parameter,) = holding(value.expand(shape))
    exact = reference.array(parameter.grad) * np.array([[0.5], [1.0], [0.25]])
    scale_slices_(parameter, rows(0.5, 1.0, 0.25))
    assert_exact(parameter.grad, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_the_slices_of_a_sparse_gradient_are_scaled_as_the_sums_they_stand_for(
    sparse_dim: int, coalesced: bool, dtype: torch.dtype
) -> None:
    indices = torch.tensor([[1, 4, 1, 0], [2, 0, 2, 1]])[:sparse_dim]
    values = random(4, *[3, 2][sparse_dim - 1 :], seed=1, dtype=dtype)
    gradient = torch.sparse_coo_tensor(indices, values, (6, 3, 2), check_invariants=True)
    summed = gradient.coalesce()
    (parameter,) = holding(summed.clone() if coalesced else gradient)
    factors = rows(1.0, 0.5, 9.0, 9.0, 0.1, 9.0)
    scale_slices_(parameter, factors)
    assert parameter.grad.is_sparse
    assert parameter.grad._nnz() == 3
    assert_exact(parameter.grad, reference.array(summed) * factors.view(-1, 1, 1).numpy())


@pytest.mark.parametrize(
    ("gradient", "factors"),
    [
        (torch.zeros(0, 3), rows()),
        (torch.zeros(3, 0), rows(0.5, 0.1, 1.0)),
        (
            torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0, 2), (3, 2), check_invariants=True),
            rows(0.5, 0.1, 1),
        ),
        (None, rows(0.5, 0.1)),
    ],
    ids=["no slices", "no entries", "sparse without entries", "absent"],
)
def test_scaling_the_slices_of_nothing_does_nothing(gradient: Tensor | None, factors: Tensor) -> None:
    (parameter,) = holding(gradient)
    scale_slices_(parameter, factors)
    assert parameter.grad is gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_non_finite_entries_become_zero_and_others_keep_their_bits(dtype: torch.dtype) -> None:
    values = [math.nan, 1.5, math.inf, -0.0, -math.inf, 6e4, -2e-7, 0.0]
    (parameter,) = holding(torch.tensor(values, dtype=dtype))
    expected = torch.tensor([v if math.isfinite(v) else 0.0 for v in values], dtype=dtype)
    write.zero_nonfinite_([parameter])
    assert same_bits(parameter.grad, expected)


def test_a_complex_entry_with_a_non_finite_part_becomes_zero() -> None:
    values = [complex(1, 2), complex(math.nan, 1), complex(3, -math.inf)]
    (parameter,) = holding(torch.tensor(values))
    write.zero_nonfinite_([parameter])
    assert parameter.grad.tolist() == [1 + 2j, 0, 0]


def test_a_sparse_gradient_is_masked_as_the_sum_it_stands_for() -> None:
    # Row 1 adds up to nan and 8; each summand of the first alone is infinite.
    (parameter,) = holding(uncoalesced([math.inf, 2.0], [math.nan, -4.0], [-math.inf, 6.0]))
    write.zero_nonfinite_([parameter])
    assert parameter.grad.to_dense().tolist() == [[0, 0], [0, 8], [0, 0], [0, 0], [0, -4], [0, 0]]


def test_masking_skips_absent_and_empty_gradients() -> None:
    parameters = holding(None, torch.zeros(0), torch.tensor(math.nan))
    write.zero_nonfinite_(parameters)
    assert parameters[0].grad is None
    assert parameters[1].grad.shape == (0,)
    assert parameters[2].grad.item() == 0


def test_dropping_removes_gradients_and_touches_nothing_else() -> None:
    gradient = random(3)
    pairs = named({"a": gradient, "b": None})
    witness, before = Witness(pairs), gradient.clone()
    write.drop_([parameter for _, parameter in pairs])
    assert [parameter.grad for _, parameter in pairs] == [None, None]
    assert witness.written() == {"a"}
    assert torch.equal(gradient, before)
    assert gradient._version == 0
    assert all(torch.equal(parameter, torch.full_like(parameter, 0.5)) for _, parameter in pairs)


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 3, 2, 2), (0, 3), (4, 0)])
def test_rows_are_centralized_as_published(shape: tuple[int, ...]) -> None:
    published = peers.module("pytorch_optimizer.optimizer.gradient_centralization").centralize_gradient
    given = random(*shape) + 1.0
    [parameter] = holding(given.clone())
    write.centralize_([parameter])
    if given.numel():
        published(given)
    torch.testing.assert_close(parameter.grad, given, rtol=1e-6, atol=1e-7)


def test_a_row_that_is_not_finite_is_left_as_it_is_and_a_sparse_one_is_centralized() -> None:
    given = random(3, 4)
    given[1, 2] = math.inf
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], random(3, 4), (5, 4), check_invariants=True)
    parameters = holding(given.clone(), sparse.clone(), None)
    write.centralize_(parameters)
    assert same_bits(parameters[0].grad[1], given[1])
    for dense in (parameters[0].grad[[0, 2]], parameters[1].grad.to_dense()):
        assert dense.mean(dim=1).abs().max() < 1e-7
        assert dense.abs().max() > 0.1
