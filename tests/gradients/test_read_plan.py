"""Plans of reading: right whatever becomes of the gradients between steps, and cheap where nothing does."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kit import reference
from kit.drawn import given, settings, st
from kit.gradients import Witness, named
from kit.work import Work
from lightning_gradclip import AGC, ClipMethod, Clipper, Normalize, NormClip, QuantileClip, ValueClip
from lightning_gradclip.gradients.blocks import block_of
from lightning_gradclip.gradients.norms import BLOCK, CHUNK, SMALL
from lightning_gradclip.gradients.read import Meter

NORM_TYPES = [0.5, 1.0, 2.0, 3.0, math.inf]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MIB = 2**20


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse(seed: int = 0) -> Tensor:
    values = drawn(3, 4, seed=seed)
    return torch.sparse_coo_tensor(torch.tensor([[1, 5, 1]]), values, (7, 4), check_invariants=True)


def agree(meter: Meter, tensors: Sequence[Tensor | None], p: float) -> None:
    """Joint and single norms and the count are those of float64, twice."""
    arrays = [torch.zeros(0).numpy() if one is None else reference.array(one) for one in tensors]
    for _ in range(2):
        assert meter.joint(tensors) == pytest.approx(reference.joint_norm(arrays, p), rel=1e-6)
        expected = [reference.p_norm(one, p) for one in arrays]
        assert meter.each(tensors).tolist() == pytest.approx(expected, rel=1e-6)
        assert meter.count(tensors) == sum(one.numel() for one in tensors if one is not None)


KINDS: dict[str, Callable[[int], Tensor | None]] = {
    "absent": lambda seed: None,
    "0-d": lambda seed: drawn(seed=seed),
    "no entry": lambda seed: drawn(0, seed=seed),
    "no row": lambda seed: drawn(0, 4, seed=seed),
    "one entry": lambda seed: drawn(1, seed=seed),
    "bias": lambda seed: drawn(4, seed=seed),
    "longer bias": lambda seed: drawn(28, seed=seed),
    "matrix": lambda seed: drawn(7, 4, seed=seed),
    "other matrix": lambda seed: drawn(4, 7, seed=seed),
    "transposed": lambda seed: drawn(4, 7, seed=seed).t(),
    "one block less": lambda seed: drawn(BLOCK - 1, seed=seed),
    "a block": lambda seed: drawn(BLOCK, seed=seed),
    "one block more": lambda seed: drawn(BLOCK + 1, seed=seed),
    "hardly small": lambda seed: drawn(SMALL - 1, seed=seed),
    "hardly large": lambda seed: drawn(SMALL, seed=seed),
    "large of another shape": lambda seed: drawn(2, SMALL // 2, seed=seed),
    "large across": lambda seed: drawn(2, SMALL // 2, seed=seed).t(),
    "kernel": lambda seed: drawn(3, 2, 5, 5, seed=seed),
    "channels last": lambda seed: drawn(3, 2, 5, 5, seed=seed).contiguous(memory_format=torch.channels_last),
    "expanded": lambda seed: drawn(7, 1, seed=seed).expand(7, 4),
    "float64": lambda seed: drawn(7, 4, seed=seed, dtype=torch.float64),
    "float16": lambda seed: drawn(7, 4, seed=seed, dtype=torch.float16),
    "bfloat16": lambda seed: drawn(7, 4, seed=seed, dtype=torch.bfloat16),
    "large float16": lambda seed: drawn(SMALL, seed=seed, dtype=torch.float16),
    "large bfloat16": lambda seed: drawn(SMALL, seed=seed, dtype=torch.bfloat16),
    "complex": lambda seed: torch.complex(drawn(7, 4, seed=seed), drawn(7, 4, seed=seed + 1)),
    "large complex": lambda seed: torch.complex(drawn(SMALL, seed=seed), drawn(SMALL, seed=seed + 1)),
    "sparse": lambda seed: sparse(seed),
}


class TestChanges:
    """One meter, whose gradients are other ones at the next step."""

    @pytest.mark.parametrize("after", KINDS)
    @pytest.mark.parametrize(("others", "p"), [(0, 2.0), (1, math.inf), (5, 2.0)])
    def test_any_gradient_may_become_any_other(self, after: str, others: int, p: float) -> None:
        beside = [drawn(4, seed=100 + i) for i in range(others)]
        for before in KINDS:
            meter = Meter(p)
            agree(meter, [KINDS[before](1), *beside], p)
            agree(meter, [KINDS[after](2), *beside], p)

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_may_become_another(self, kind: str) -> None:
        meter = Meter(2.0)
        for before in ("matrix", "hardly large", "bias", "0-d"):
            for step in (before, kind):
                agree(meter, [KINDS[step](i) for i in range(6)], 2.0)

    @settings(derandomize=True, deadline=None, max_examples=120)
    @given(
        steps=st.lists(st.lists(st.sampled_from(sorted(KINDS)), min_size=7, max_size=7), min_size=2, max_size=4),
        p=st.sampled_from(NORM_TYPES),
    )
    def test_any_list_may_follow_any_other(self, steps: list[list[str]], p: float) -> None:
        meter = Meter(p)
        for number, kinds in enumerate(steps):
            agree(meter, [KINDS[kind](10 * number + i) for i, kind in enumerate(kinds)], p)

    def test_the_list_may_change_its_length(self) -> None:
        meter = Meter(2.0)
        for length in (3, 5, 0, 1, 8):
            agree(meter, [drawn(4, i, seed=i) for i in range(length)], 2.0)

    def test_as_many_others_may_be_present(self) -> None:
        meter, tensors = Meter(2.0), [drawn(4, seed=i) for i in range(5)]
        for absent in (0, 3, 1):
            agree(meter, [None if i == absent else one for i, one in enumerate(tensors)], 2.0)

    @pytest.mark.parametrize("method", [NormClip(statistic="rms"), NormClip(statistic="rms", per="parameter")], ids=str)
    def test_root_mean_squares_follow_the_number_of_entries(self, method: ClipMethod) -> None:
        pairs = named({"a": torch.full((4,), 3.0), "b": torch.full((2,), 3.0)})
        clipper = Clipper(pairs, method)
        scopes = len(pairs) if method.per == "parameter" else 1
        assert clipper.step().sizes.tolist() == pytest.approx([3.0] * scopes)
        for _, parameter in pairs:
            parameter.data = torch.zeros(100)
            parameter.grad = torch.full((100,), 2.0)
        assert clipper.step().sizes.tolist() == pytest.approx([2.0] * scopes)


class TestSizes:
    @pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, SMALL - 1, SMALL, CHUNK - 1, CHUNK, CHUNK + 1])
    def test_norms_around_each_threshold(self, count: int, dtype: torch.dtype, p: float) -> None:
        agree(Meter(p), [drawn(count, dtype=dtype)], p)

    @pytest.mark.parametrize(
        ("count", "row"),
        [(2**20, 512), (768 * 768, 512), (50_257 * 768, 464), (100_000, 400), (3 * 5**7, 375), (99_991, 512)],
    )
    def test_rows_leave_nothing_over_where_that_is_possible(self, count: int, row: int) -> None:
        assert block_of(count) == row
        assert (count % row == 0) == (count != 99_991)
        with Work() as work:
            Meter(2.0).joint([drawn(count)])
        assert work.operations.count("aten::linalg_vector_norm") == 2 + (count == 99_991)

    @pytest.mark.parametrize("count", [2**20 - 1, 2**20, 2**20 + 1])
    def test_large_bfloat16_is_as_exact_as_documented(self, count: int) -> None:
        normal = drawn(count, dtype=torch.bfloat16)
        rel = 1e-6 if count < 2**20 else 1e-4
        assert Meter(2.0).joint([normal]) == pytest.approx(reference.p_norm(reference.array(normal), 2.0), rel=rel)
        # Rows that are all rounded in the same direction.
        equal = torch.full((count,), 1.0078125, dtype=torch.bfloat16)
        rel = 1e-6 if count < 2**20 else 4e-3
        assert Meter(2.0).joint([equal]) == pytest.approx(1.0078125 * math.sqrt(count), rel=rel)

    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("count", [3, SMALL, 2**20])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_what_is_not_finite_shows_wherever_it_is(
        self, dtype: torch.dtype, bad: float, count: int, p: float
    ) -> None:
        meter = Meter(p)
        for place in (0, count // 2, count - 1):
            spoilt = torch.ones(count, dtype=dtype)
            spoilt[place] = bad
            tensors = [torch.ones(3), spoilt, torch.ones(5)]
            joint = meter.joint(tensors)
            assert joint is not None
            assert not math.isfinite(joint)
            assert torch.isfinite(meter.each(tensors)).tolist() == [True, False, True]

    def test_only_what_left_the_range_is_measured_again(self) -> None:
        spoilt, infinite, large = (drawn(2**15, seed=i) for i in range(3))
        spoilt[7], infinite[7] = math.nan, math.inf
        # The range is looked at, and then the largest entry of the one tensor.
        for odd, looks in ((spoilt, 0), (infinite, 2), (large * 1e30, 2)):
            tensors = [drawn(2**15, seed=3), odd, drawn(2**15, seed=4)]
            meter = Meter(2.0)
            meter.joint(tensors)
            with Work() as work:
                norm = meter.joint(tensors)
            expected = reference.joint_norm([reference.array(one) for one in tensors], 2.0)
            assert norm == pytest.approx(expected, rel=1e-6, nan_ok=True)
            assert work.operations.count("aten::aminmax") == looks


LISTS: dict[str, Callable[[], list[Tensor]]] = {
    "2,000 of 1,000": lambda: [drawn(1000, seed=i) for i in range(2000)],
    "one large": lambda: [drawn(4 * MIB)],
    "a language model in small": lambda: [
        drawn(*shape, seed=i)
        for i, shape in enumerate([(12_000, 96), (256, 96), *[(96,), (288, 96), (288,), (96, 96), (384, 96)] * 12])
    ],
}


class TestCost:
    @pytest.mark.parametrize("p", NORM_TYPES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_copy_of_a_large_gradient_is_made(self, dtype: torch.dtype, p: float) -> None:
        tensors = [drawn(2**21).to(dtype), drawn(2**11, 2**10).to(dtype).t()]
        meter = Meter(p)
        for scale in (1.0, 1e-30, 0.0, math.nan):
            # Tiny entries are measured exactly, and so are zeros, which might be what is left of them.
            scaled = [one if scale == 1.0 else one * scale for one in tensors]
            with Work() as work:
                meter.joint(scaled)
                meter.each(scaled)
            assert work.largest <= MIB

    @pytest.mark.parametrize("name", LISTS)
    @pytest.mark.parametrize("limit", [1e9, 1e-3], ids=["within", "over"])
    @pytest.mark.parametrize("per", ["model", "parameter"])
    def test_clipping_by_norm_makes_nothing_larger_than_a_mebibyte(self, name: str, limit: float, per: str) -> None:
        pairs = named({f"w{i}": one for i, one in enumerate(LISTS[name]())})
        clipper = Clipper(pairs, NormClip(max_norm=limit, per=per))
        for _ in range(2):
            with Work() as work:
                clipper.step()
            assert work.largest <= MIB

    @pytest.mark.parametrize(
        ("name", "measuring", "apart"),
        [("2,000 of 1,000", 40, 70), ("one large", 8, 12), ("a language model in small", 45, 140)],
    )
    def test_measuring_takes_few_operations(self, name: str, measuring: int, apart: int) -> None:
        tensors, meter = LISTS[name](), Meter(2.0)
        for reading, most in ((meter.joint, measuring), (meter.each, apart)):
            reading(tensors)
            with Work() as work:
                reading(tensors)
            assert 0 < len(work.operations) <= most

    @pytest.mark.parametrize(
        "method", [NormClip(max_norm=1e-3), AGC(clip_factor=1e-6), ValueClip(max_value=1e-3)], ids=str
    )
    def test_a_clipped_step_takes_few_operations(self, method: ClipMethod) -> None:
        pairs = named({f"w{i}": drawn(1000, seed=i) for i in range(2000)})
        clipper = Clipper(pairs, method)
        clipper.detailed = False
        clipper.step()
        with Work() as work:
            clipper.step()
        assert len(work.operations) <= 110


WRITERS = {
    "norm": (NormClip(max_norm=1e9), NormClip(max_norm=1e-3)),
    "norm per parameter": (NormClip(max_norm=1e9, per="parameter"), NormClip(max_norm=1e-3, per="parameter")),
    "agc": (AGC(clip_factor=1e9), AGC(clip_factor=1e-6)),
    "agc per parameter": (AGC(clip_factor=1e9, per="parameter"), AGC(clip_factor=1e-6, per="parameter")),
    "value": (ValueClip(max_value=1e9), ValueClip(max_value=1e-3)),
    "quantile": (QuantileClip(), None),
    "normalize": (None, Normalize()),
}


class TestWrites:
    @staticmethod
    def pairs(dtype: torch.dtype) -> list:
        shapes = [(), (5,), (7, 4), (3, 2, 5, 5), (2, SMALL), (CHUNK + 3,)]
        return named({f"w{i}": drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)})

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", [name for name, (within, _) in WRITERS.items() if within])
    def test_a_step_within_the_limit_writes_nothing(self, name: str, dtype: torch.dtype) -> None:
        pairs = self.pairs(dtype)
        witness = Witness(pairs)
        Clipper(pairs, WRITERS[name][0]).step()
        assert not witness.written()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", [name for name, (_, over) in WRITERS.items() if over])
    def test_a_step_over_the_limit_writes_each_gradient_once(self, name: str, dtype: torch.dtype) -> None:
        pairs = self.pairs(dtype)
        before = [parameter.grad._version for _, parameter in pairs]
        Clipper(pairs, WRITERS[name][1]).step()
        writes = [parameter.grad._version - version for (_, parameter), version in zip(pairs, before, strict=True)]
        assert writes == [1] * 6
