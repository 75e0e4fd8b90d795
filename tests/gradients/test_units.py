"""Output units as scopes: which they are, their norms against float64, and a method over them."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from kit import reference
from kit.drawn import given, settings, st
from kit.gradients import Witness, named, same_bits
from kit.running_max import RunningMax
from lightning_gradclip import ClipMethod, Clipper
from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients.read import Meter
from lightning_gradclip.gradients.units import UnitMeter
from lightning_gradclip.select.scopes import Units

CPU = torch.device("cpu")
NORM_TYPES = [0.5, 1.0, 2.0, 3.0, math.inf]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Around the size above which a row is measured in parts, and with a last part that is not full.
COLUMNS = [1, 1000, 8192, 8193, 50_003]


def entries(*shape: int, seed: int = 0, spread: float = 0.2) -> Tensor:
    """Entries of both signs; their magnitudes are lognormal, like those of a gradient where `spread` is 2."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(shape, generator=generator).sign()
    return signs * torch.exp(spread * torch.randn(shape, generator=generator))


def unit_norms(tensors: Sequence[Tensor | None], units: Units, p: float, *, exact: bool = False) -> Tensor:
    """What a meter says, the same when it has seen the tensors before."""
    meter = UnitMeter(units, p)
    found = meter.exact(tensors) if exact else meter.each(tensors)
    again = meter.exact(tensors) if exact else meter.each(tensors)
    assert torch.equal(found.nan_to_num(-1.0), again.nan_to_num(-1.0))
    return found


def units_of(*tensors: Tensor) -> Units:
    return Units(tuple(f"w{i}" for i in range(len(tensors))), tuple(tensors))


def norms_of(tensor: Tensor, p: float = 2.0, *, exact: bool = False) -> Tensor:
    """The norms of the units of one tensor."""
    return unit_norms([tensor], units_of(tensor), p, exact=exact)


def expected(tensor: Tensor, p: float = 2.0) -> list[float]:
    values = reference.array(tensor)
    return [reference.p_norm(row, p) for row in (values if values.ndim > 1 else [values])]


class TestUnits:
    @pytest.mark.parametrize(
        ("shape", "names"),
        [
            ((3, 2), ["w0[0]", "w0[1]", "w0[2]"]),
            ((2, 3, 4, 5), ["w0[0]", "w0[1]"]),
            ((1, 4), ["w0[0]"]),
            ((3,), ["w0"]),
            ((1,), ["w0"]),
            ((), ["w0"]),
            ((0, 3), []),
            ((2, 0), ["w0[0]", "w0[1]"]),
            ((0,), ["w0"]),
        ],
        ids=str,
    )
    def test_a_unit_is_a_slice_of_a_weight_or_a_whole_bias(self, shape: tuple[int, ...], names: list[str]) -> None:
        units = units_of(torch.zeros(shape))
        assert units.names == tuple(names)
        assert units.count == len(names)
        assert units.index_on(CPU).tolist() == [0] * len(names)
        assert norms_of(torch.zeros(shape)).tolist() == [0] * len(names)

    def test_units_are_in_the_order_of_their_parameters(self) -> None:
        shapes = {"a.weight": (2, 3), "a.bias": (2,), "none": (0, 4), "b.weight": (3, 1), "c": ()}
        units = Units(tuple(shapes), tuple(map(torch.zeros, shapes.values())))
        assert units.names == ("a.weight[0]", "a.weight[1]", "a.bias", "b.weight[0]", "b.weight[1]", "b.weight[2]", "c")
        assert units.counts == (2, 1, 0, 3, 1)
        assert units.index_on(CPU).tolist() == [0, 0, 1, 3, 3, 3, 4]
        assert units.index_on(CPU).dtype == torch.int64

    def test_without_parameters_there_are_none(self) -> None:
        units = Units((), ())
        assert (units.count, units.names, units.index_on(CPU).tolist()) == (0, (), [])
        assert unit_norms([], units, 2.0).tolist() == []

    def test_names_are_made_when_somebody_asks_and_once(self) -> None:
        weight = Parameter(torch.ones(4, 3))
        weight.grad = torch.ones(4, 3)
        clipper = Clipper([("w", weight)], Constant(), measure_per="layer")
        stats = clipper.step()
        clipper.metrics()
        assert "names" not in vars(stats._scopes)
        assert stats.scopes == ("w[0]", "w[1]", "w[2]", "w[3]")
        assert stats.scopes is stats.scopes

    def test_the_index_is_moved_to_a_device_once(self) -> None:
        units = units_of(torch.zeros(2, 2))
        assert units.index_on(CPU) is units.index_on(CPU)

    @pytest.mark.parametrize("shape", [(4, 6), (40, 60), (400, 600)], ids=str)
    @pytest.mark.parametrize("others", [0, 1])
    def test_another_number_of_units_is_an_error(self, shape: tuple[int, int], others: int) -> None:
        tensors = [entries(*shape) for _ in range(1 + others)]
        meter = UnitMeter(units_of(*tensors), 2.0)
        meter.each(tensors)
        turned = [one.t().contiguous() for one in tensors]
        with pytest.raises(RuntimeError, match=re.escape(f"had {shape[0]} units and now has the shape {shape[::-1]}")):
            meter.each(turned)
        wider = [one.repeat(1, 2) for one in tensors]
        expected = torch.cat([one.norm(dim=1) for one in wider])
        torch.testing.assert_close(meter.each(wider), expected, rtol=1e-6, atol=0)


class TestNorms:
    @pytest.mark.parametrize("columns", COLUMNS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_norm_is_exact_to_1e6(self, columns: int, dtype: torch.dtype) -> None:
        tensor = entries(3, columns, spread=2.0).to(dtype)
        rtol = 1e-12 if dtype == torch.float64 else 1e-6
        for p in NORM_TYPES:
            assert norms_of(tensor, p).tolist() == pytest.approx(expected(tensor, p), rel=rtol)

    @pytest.mark.parametrize("columns", [8192, 8193, 1_000_000])
    @pytest.mark.parametrize("rows", [None, 2])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_up_to_a_million_uniform_entries_are_exact_to_1e6(
        self, dtype: torch.dtype, rows: int | None, columns: int
    ) -> None:
        shape = (columns,) if rows is None else (rows, columns)
        tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert norms_of(tensor).tolist() == pytest.approx(expected(tensor), rel=1e-6)

    @pytest.mark.parametrize("columns", [8000, 9000])
    def test_rows_across_memory_are_exact_to_1e6(self, columns: int) -> None:
        # torch adds them up one after the other.
        tensor = torch.rand(columns, 200, generator=torch.Generator().manual_seed(0)).t()
        assert norms_of(tensor).tolist() == pytest.approx(expected(tensor), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(5, 3), (3, 8192), (6, 2, 3, 3), (400, 7), (8192,), (7,)])
    def test_up_to_8192_entries_norms_are_those_of_torch_to_the_bit(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        dims = tuple(range(1, len(shape))) or (0,)
        assert same_bits(norms_of(tensor), torch.linalg.vector_norm(tensor, dim=dims).view(-1))

    @pytest.mark.parametrize("columns", [1, 5, 9000])
    @pytest.mark.parametrize("exact", [True, False])
    def test_rows_of_every_scale_together(self, columns: int, exact: bool) -> None:
        scales = torch.tensor([1.0, 1e-30, 1e25, 0.0, 3e38, 1e-45, 1e-13, 1e19, 0.0])
        tensor = entries(len(scales), columns, spread=0.0) * scales[:, None]
        for p in NORM_TYPES:
            assert norms_of(tensor, p, exact=exact).tolist() == pytest.approx(expected(tensor, p), rel=1e-6)

    @pytest.mark.parametrize("values", [[1e-25, 3e-25], [1e-45], [1e30, -2e30], [3e38] * 50, [1e-30] * 20_000], ids=len)
    @pytest.mark.parametrize("alone", [True, False])
    def test_one_extreme_row(self, values: list[float], alone: bool) -> None:
        # Alone it is the smallest and the largest norm.
        tensor = torch.tensor([values] if alone else [[1.0] * len(values), values])
        for p in NORM_TYPES:
            assert norms_of(tensor, p).tolist() == pytest.approx(expected(tensor, p), rel=1e-6)

    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("exact", [True, False])
    def test_rows_at_the_edges_of_float64(self, exact: bool, p: float) -> None:
        scales = torch.tensor([1e200, 1.0, 1e-200, 0.0, 1e-300], dtype=torch.float64)
        tensor = scales[:, None] * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        for one in (tensor, *tensor.split(1)):
            assert norms_of(one, p, exact=exact).tolist() == pytest.approx(expected(one, p), rel=1e-12)

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128], ids=str)
    def test_the_slow_norms_are_exact_to_1e12(self, dtype: torch.dtype) -> None:
        # Equal entries: every addition rounds in the same direction.
        for tensor in (torch.full((2, 5000), 0.1, dtype=dtype), entries(3, 7).to(dtype), entries(9).to(dtype)):
            for p in NORM_TYPES:
                norms = norms_of(tensor, p, exact=True)
                assert norms.dtype == torch.float64
                assert norms.tolist() == pytest.approx(expected(tensor, p), rel=1e-12)

    @pytest.mark.parametrize("p", NORM_TYPES)
    def test_float16_rows_above_65504_and_below_its_smallest(self, p: float) -> None:
        tensor = (entries(2, 500) * torch.tensor([[2e4], [1e-7]])).half()
        assert torch.isfinite(tensor).all()
        assert norms_of(tensor, p).tolist() == pytest.approx(expected(tensor, p), rel=1e-6)

    @pytest.mark.parametrize("p", [2.0, math.inf])
    @pytest.mark.parametrize("zeros", [[1], [0, 2], [0, 1, 2, 3]])
    def test_rows_of_zeros_are_zero_and_not_measured_again(self, zeros: list[int], p: float) -> None:
        tensor = entries(4, 6)
        tensor[zeros] = 0
        norms = norms_of(tensor, p)
        assert norms.tolist() == pytest.approx(expected(tensor, p), rel=1e-6)
        # What is measured again is float64.
        assert norms.dtype == torch.float32
        tensor[zeros[0], 0] = 1e-30
        again = norms_of(tensor, p)
        assert again.tolist() == pytest.approx(expected(tensor, p), rel=1e-6)
        assert again.dtype == (torch.float32 if p == math.inf else torch.float64)

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
    def test_a_non_finite_entry_shows_in_its_unit_and_nowhere_else(
        self, dtype: torch.dtype, bad: float, exact: bool
    ) -> None:
        tensor = torch.ones(4, 3, dtype=dtype)
        tensor[1, 2] = bad
        tensor[3] = 0
        for p in NORM_TYPES:
            norms = norms_of(tensor, p, exact=exact)
            assert torch.isfinite(norms).tolist() == [True, False, True, True]
            assert norms[[0, 2, 3]].tolist() == pytest.approx([reference.p_norm(np.ones(3), p)] * 2 + [0], rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("columns", [5, 9000])
    def test_complex_entries_count_by_their_magnitudes(self, columns: int, p: float, dtype: torch.dtype) -> None:
        tensor = torch.complex(entries(3, columns), entries(3, columns, seed=1)).to(dtype)
        norms = norms_of(tensor, p)
        assert not norms.is_complex()
        assert norms.tolist() == pytest.approx(expected(tensor, p), rel=1e-6)

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(
        p=st.sampled_from(NORM_TYPES),
        rows=st.lists(st.integers(-44, 38), min_size=1, max_size=6),
        columns=st.integers(1, 40),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 1000),
    )
    def test_rows_of_any_scale(self, p: float, rows: list[int], columns: int, dtype: torch.dtype, seed: int) -> None:
        scales = 10.0 ** torch.tensor(rows, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        drawn = 2 * torch.rand(len(rows), columns, generator=generator, dtype=torch.float64) - 1
        tensor = (drawn * scales[:, None]).to(dtype)
        for exact in (False, True):
            np.testing.assert_allclose(norms_of(tensor, p, exact=exact), expected(tensor, p), rtol=1e-6, atol=0)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(-3.0),
    "channels-last": lambda: entries(8, 6, 5, 5).contiguous(memory_format=torch.channels_last),
    "long channels-last": lambda: entries(2, 30, 20, 20).contiguous(memory_format=torch.channels_last),
    "channels-last 3d": lambda: entries(3, 4, 2, 5, 5).contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda: entries(20, 30).t(),
    "long transposed": lambda: entries(9000, 3).t(),
    "permuted": lambda: entries(4, 5, 6).permute(2, 0, 1),
    "every other column": lambda: entries(30, 20)[:, ::2],
    "every other row": lambda: entries(30, 20)[::2],
    "every other entry": lambda: entries(20)[::2],
    "a slice of a slice": lambda: entries(6, 10, 4)[1:3, 2:7, ::3],
    "expanded rows": lambda: entries(1, 15).expand(20, 15),
    "expanded columns": lambda: entries(20, 1).expand(20, 15),
    "expanded kernels": lambda: entries(4, 3, 1, 1).expand(4, 3, 5, 5),
    "expanded bias": lambda: torch.tensor(0.1).expand(7),
    "one column": lambda: entries(20, 1),
    "one row": lambda: entries(1, 20_000, 1),
    "conjugated": lambda: torch.complex(entries(5, 4), entries(5, 4, seed=1)).conj(),
    "requires grad": lambda: entries(5, 4).requires_grad_(),
}


class TestLayouts:
    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_layout_does_not_matter(self, layout: str, exact: bool) -> None:
        tensor = LAYOUTS[layout]()
        for p in NORM_TYPES:
            assert norms_of(tensor, p, exact=exact).tolist() == pytest.approx(expected(tensor, p), rel=1e-6)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_measuring_writes_nothing(self, layout: str) -> None:
        tensor = LAYOUTS[layout]()
        before, version = tensor.detach().clone(), tensor._version
        for exact in (True, False):
            norms_of(tensor, exact=exact)
        assert torch.equal(tensor, before)
        assert tensor._version == version

    @pytest.mark.parametrize("layout", ["channels-last", "channels-last 3d"])
    def test_in_any_order_the_norms_are_those_of_torch_to_the_bit(self, layout: str) -> None:
        tensor = LAYOUTS[layout]()
        dims = tuple(range(1, tensor.ndim))
        assert same_bits(norms_of(tensor), torch.linalg.vector_norm(tensor, dim=dims))

    @pytest.mark.parametrize("columns", [200, 512, 513])
    @pytest.mark.parametrize("layout", ["transposed", "expanded"])
    def test_entries_apart_are_summed_as_if_they_lay_together(self, layout: str, columns: int) -> None:
        """One after the other, as torch sums them, they are off by more than 1e-6."""
        tensor = (
            torch.full((columns, 8), 0.7698).t() if layout == "transposed" else torch.tensor(0.7698).expand(8, columns)
        )
        norms = norms_of(tensor)
        assert norms.tolist() == pytest.approx(expected(tensor), rel=2e-7)
        assert columns > 512 or same_bits(norms, torch.linalg.vector_norm(tensor.contiguous(), dim=1))

    @pytest.mark.parametrize("exact", [True, False])
    def test_absent_and_empty_tensors_are_zeros_in_their_place(self, exact: bool) -> None:
        shapes = [(2, 3), (4,), (2, 2), (0, 3), (2, 0), (1, 2), (3, 2)]
        units = units_of(*(torch.zeros(shape) for shape in shapes))
        tensors = [
            None,
            torch.full((4,), 2.0),
            None,
            torch.zeros(0, 3),
            torch.zeros(2, 0),
            None,
            torch.tensor([[3.0, -4.0], [0.0, 0.0], [5.0, 12.0]]),
        ]
        norms = unit_norms(tensors, units, 2.0, exact=exact)
        assert norms.tolist() == [0, 0, 4, 0, 0, 0, 0, 0, 5, 0, 13]

    def test_without_any_tensor_all_are_zero(self) -> None:
        units = units_of(torch.zeros(2, 3), torch.zeros(3))
        assert unit_norms([None, None], units, 2.0).tolist() == [0, 0, 0]

    def test_norms_of_several_dtypes_are_in_the_widest(self) -> None:
        tensors = [entries(3, 40, seed=i).to(dtype) for i, dtype in enumerate([*DTYPES, torch.complex64])]
        norms = unit_norms(tensors, units_of(*tensors), 2.0)
        assert norms.dtype == torch.float64
        assert norms.tolist() == pytest.approx([norm for one in tensors for norm in expected(one)], rel=1e-6)
        halves = [tensors[2], tensors[3]]
        assert unit_norms(halves, units_of(*halves), 2.0).dtype == torch.float32


def coo(indices: list[list[int]], values: Tensor, *size: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor(indices), values, size, check_invariants=True)


SPARSE: dict[str, Callable[[torch.dtype], Tensor]] = {
    # Rows 1, 4 and 1 again.
    "embedding": lambda dtype: coo([[1, 4, 1]], torch.tensor([[1.0, 2.0], [3.0, -4.0], [-5.0, 6.0]]).to(dtype), 6, 2),
    "coalesced": lambda dtype: coo([[0, 5]], torch.tensor([[1.0, 2.0], [3.0, -4.0]]).to(dtype), 6, 2).coalesce(),
    "kernels": lambda dtype: coo([[3, 0, 3]], entries(3, 2, 5).to(dtype), 4, 2, 5),
    # Single entries, some of one row, one of them twice.
    "entries": lambda dtype: coo([[2, 0, 2, 2], [1, 0, 2, 1]], torch.tensor([3.0, -1.0, 4.0, 2.0]).to(dtype), 4, 3),
    "entries of kernels": lambda dtype: coo([[2, 0, 2], [1, 0, 0]], entries(3, 5).to(dtype), 4, 2, 5),
    "bias": lambda dtype: coo([[3, 1, 3]], torch.tensor([1.0, 2.0, 3.0]).to(dtype), 5),
    "without entries": lambda dtype: coo([[]], torch.zeros(0, 2, dtype=dtype), 6, 2).to(dtype),
    "without columns": lambda dtype: coo([[1, 4]], torch.zeros(2, 0, dtype=dtype), 6, 0),
    "stored zeros": lambda dtype: coo([[1, 4]], torch.tensor([[0.0, 0.0], [1.0, 0.0]]).to(dtype), 6, 2),
}


class TestSparse:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
    @pytest.mark.parametrize("kind", SPARSE)
    def test_units_are_those_of_the_dense_tensor(self, kind: str, dtype: torch.dtype) -> None:
        tensor = SPARSE[kind](dtype)
        # Duplicates are added up in their own dtype.
        summed = tensor.coalesce()
        for p in NORM_TYPES:
            for exact in (True, False):
                norms = norms_of(tensor, p, exact=exact)
                assert norms.tolist() == pytest.approx(expected(summed, p), rel=1e-6)

    @pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 3e37])
    def test_rows_beyond_the_range_of_float32(self, scale: float) -> None:
        values = entries(5, 3, spread=0.0) * torch.tensor([1.0, scale, 1.0, scale, 0.0])[:, None]
        tensor = coo([[5, 1, 2, 0, 3]], values, 6, 3)
        for p in NORM_TYPES:
            assert norms_of(tensor, p).tolist() == pytest.approx(expected(tensor, p), rel=1e-6)

    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_non_finite_entry_shows_in_its_unit_and_nowhere_else(self, bad: float, p: float) -> None:
        tensor = coo([[2, 0, 2], [1, 0, 2]], torch.tensor([bad, -1.0, 4.0]), 4, 3)
        norms = norms_of(tensor, p)
        assert torch.isfinite(norms).tolist() == [True, True, False, True]
        assert norms[[0, 1, 3]].tolist() == [1, 0, 0]

    def test_measuring_leaves_a_sparse_gradient_as_it_is(self) -> None:
        tensor = SPARSE["embedding"](torch.float32)
        norms_of(tensor)
        assert not tensor.is_coalesced()
        assert tensor._values().tolist() == [[1, 2], [3, -4], [-5, 6]]

    def test_among_dense_ones(self) -> None:
        tensors = [entries(2, 3), SPARSE["embedding"](torch.float32), entries(4)]
        norms = unit_norms(tensors, units_of(*tensors), 2.0)
        assert norms.tolist() == pytest.approx([norm for one in tensors for norm in expected(one)], rel=1e-6)


class Constant(ClipMethod):
    """Limits each unit to 1."""

    per = "unit"

    def __init__(self, norm_type: float = 2.0) -> None:
        self.norm_type = norm_type

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return torch.ones_like(size)


class TestAnyMethod:
    """What AGC does not need."""

    @pytest.mark.parametrize("p", NORM_TYPES)
    def test_every_norm_type(self, p: float) -> None:
        gradients = {"w": entries(3, 4), "b": 1e-3 * entries(5), "v": entries(2, 2, 2)}
        gradients["w"][1] *= 1e-3
        pairs = named({name: one.clone() for name, one in gradients.items()})
        witness = Witness(pairs)
        clipper = Clipper(pairs, Constant(p), measure_per="parameter")
        stats = clipper.step()
        sizes = [size for one in gradients.values() for size in expected(one, p)]
        assert stats.sizes.tolist() == pytest.approx(sizes, rel=1e-6)
        for name, parameter in pairs:
            for before, after in zip(expected(gradients[name], p), expected(parameter.grad, p), strict=True):
                assert after == pytest.approx(min(before, 1.0), rel=2e-6)
        assert witness.written() == {"w", "v"}
        wholes = {f"norm/{name}": reference.p_norm(reference.array(one), p) for name, one in gradients.items()}
        found = {name: value for name, value in clipper.metrics().items() if name.startswith("norm/")}
        assert found == pytest.approx(wholes, rel=1e-6)
        assert stats.norm.item() == pytest.approx(
            reference.joint_norm([reference.array(one) for one in gradients.values()], p), rel=1e-6
        )
        assert stats.norm_clipped.item() == pytest.approx(
            reference.joint_norm([reference.array(parameter.grad) for _, parameter in pairs], p), rel=2e-6
        )

    def test_what_is_learned_of_a_unit_finds_it_again_by_its_name(self) -> None:
        shapes = {"a": (2, 3), "b": (2, 3)}
        pairs = named({name: entries(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())})
        clipper = Clipper(pairs, RunningMax(per="unit"))
        sizes = dict(zip(clipper.step().scopes, clipper.step().sizes.tolist(), strict=True))
        resumed = Clipper(pairs[::-1], RunningMax(per="unit"))
        resumed.load_state_dict(clipper.state_dict())
        stats = resumed.step()
        assert stats.scopes == ("b[0]", "b[1]", "a[0]", "a[1]")
        assert stats.limits.tolist() == [sizes[name] for name in stats.scopes]
        assert len(set(sizes.values())) == 4

    def test_parameters_that_take_their_shape_later_have_units(self) -> None:
        # As those of nn.LazyLinear before the first batch.
        layer = nn.LazyLinear(3)
        assert isinstance(layer.weight, UninitializedParameter)
        clipper = Clipper(layer.named_parameters(), Constant())
        layer(torch.ones(2, 4))
        layer.weight.grad = 4 * torch.ones(3, 4)
        stats = clipper.step()
        assert stats.scopes == ("weight[0]", "weight[1]", "weight[2]", "bias")
        assert stats.sizes.tolist() == [8, 8, 8, 0]
        assert layer.weight.grad.tolist() == [pytest.approx([0.5] * 4, rel=1e-6)] * 3


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_units_of_a_parameter_make_up_its_norm(p: float) -> None:
    tensors = [entries(7, 5), entries(4), entries(2, 3, 3), entries(1, 9)]
    units = units_of(*tensors)
    norms = unit_norms(tensors, units, p).double()
    joined = pnorm.grouped_norms(norms, units.index_on(CPU), len(tensors), p)
    assert joined.tolist() == pytest.approx(Meter(p).each(tensors).tolist(), rel=1e-6)


def test_root_mean_squares_are_over_the_entries_of_a_unit() -> None:
    class PerUnit(ClipMethod):
        per, statistic = "unit", "rms"

        def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
            return torch.full_like(size, 2.0)

    gradients = {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]]), "b": torch.tensor([5.0, 12.0, 0.0])}
    stats = Clipper(named(gradients), PerUnit()).step()
    assert stats.sizes.tolist() == pytest.approx([5 / math.sqrt(2), 0.5 / math.sqrt(2), 13 / math.sqrt(3)])
