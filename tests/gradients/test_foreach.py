"""torch's operations over lists, with the private names that torch has and without them."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kit.gradients import same_bits
from lightning_gradclip import AGC, ClipMethod, Clipper, NormClip, ValueClip
from lightning_gradclip.gradients import foreach

PRIVATE = ("_norm", "_mul", "_unscale", "_flatten")


@pytest.fixture(params=["private", "public"])
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With torch's private functions, and as with a release of torch that has none of them."""
    for name in PRIVATE:
        assert getattr(foreach, name) is not None
        if request.param == "public":
            monkeypatch.setattr(foreach, name, None)
    return request.param


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((), (3,), (2, 5), (4, 1, 3))]


@pytest.mark.usefixtures("names")
class TestEachFunction:
    @pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
    @pytest.mark.parametrize("wide", [None, torch.float64])
    def test_norms(self, p: float, wide: torch.dtype | None) -> None:
        found = foreach.norms(tensors(), p, wide)
        assert [one.dtype for one in found] == [wide or torch.float32] * 4
        expected = [torch.linalg.vector_norm(one.double(), p).item() for one in tensors()]
        assert [one.item() for one in found] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("across", [False, True])
    def test_flatten(self, across: bool) -> None:
        some = [one.t() if across and one.ndim == 2 else one for one in tensors()]
        found = foreach.flatten(some)
        assert found.tolist() == [value for one in some for value in one.reshape(-1).tolist()]
        assert all(found.data_ptr() != one.data_ptr() for one in some)

    def test_multiply_by_one_factor(self) -> None:
        some = tensors()
        foreach.multiply_(some, torch.tensor(0.3))
        assert all(same_bits(one, before * torch.tensor(0.3)) for one, before in zip(some, tensors(), strict=True))

    def test_multiply_each_by_its_own(self) -> None:
        some, factors = tensors(), torch.tensor([0.1, 0.2, 0.3, 0.4]).unbind()
        foreach.multiply_(some, factors)
        expected = [one * factor for one, factor in zip(tensors(), factors, strict=True)]
        assert all(map(same_bits, some, expected))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_scale(self, dtype: torch.dtype, default: torch.dtype) -> None:
        some, before = tensors(dtype), torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            foreach.scale_(some, 0.3)
        finally:
            torch.set_default_dtype(before)
        factor = torch.tensor(0.3)
        expected = [(one.float() * factor).to(dtype) for one in tensors(dtype)]
        assert all(map(same_bits, some, expected))
        assert [one._version for one in some] == [1] * 4

    def test_threads_scale_each_by_its_own_factor(self) -> None:
        factors = [0.5, 0.25, 2.0, 3.0]

        def work(factor: float) -> set[float]:
            results = set()
            for _ in range(300):
                some = list(torch.ones(40, 7))
                foreach.scale_(some, factor)
                results.update(torch.stack(some).unique().tolist())
            return results

        # The threads take turns as often as they can.
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(len(factors)) as pool:
                assert list(pool.map(work, factors)) == [{factor} for factor in factors]
        finally:
            sys.setswitchinterval(before)

    def test_scale_works_after_it_was_first_used_in_inference_mode(self) -> None:
        def work() -> Tensor:
            with torch.inference_mode():
                foreach.scale_([torch.ones(3)], 0.5)
            some = torch.ones(3)
            foreach.scale_([some], 0.5)
            return some

        # Of a thread of its own, which has not used it before.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work).result().tolist() == [0.5] * 3

    @pytest.mark.parametrize("numel", [4095, 4096, 4097, 20_000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_scale_gives_the_same_bits_whatever_the_size(self, numel: int, dtype: torch.dtype) -> None:
        some = [torch.randn(numel, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
        expected = [(one.float() * torch.tensor(0.3)).to(dtype) for one in some]
        foreach.scale_(some, 0.3)
        assert all(map(same_bits, some, expected))
        assert [one._version for one in some] == [1] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method",
    [NormClip(max_norm=0.5), NormClip(max_norm=0.1, per="parameter"), AGC(), ValueClip(max_value=0.1)],
    ids=str,
)
def test_a_step_is_the_same_without_private_names(
    method: ClipMethod, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clipped() -> list[Tensor]:
        pairs = [(f"w{i}", torch.nn.Parameter(torch.ones_like(one))) for i, one in enumerate(tensors(dtype))]
        for (_, parameter), one in zip(pairs, tensors(dtype), strict=True):
            parameter.grad = one
        Clipper(pairs, method).step()
        return [parameter.grad for _, parameter in pairs if parameter.grad is not None]

    private = clipped()
    for name in PRIVATE:
        monkeypatch.setattr(foreach, name, None)
    assert all(map(same_bits, private, clipped()))
    assert not all(map(same_bits, private, tensors(dtype)))
