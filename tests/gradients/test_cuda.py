"""The kernel that leaves gradients alone where their coefficient is 1, in Triton's interpreter on the CPU."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kit.extras import needs
from kit.gradients import same_bits
from lightning_gradclip import Clipper, NormClip
from lightning_gradclip.act.policy import Options
from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients.norms import LAUNCH

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernel() -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # Read when the kernel is defined.
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "lightning_gradclip.gradients.cuda", raising=False)
        from lightning_gradclip.gradients import cuda

        yield cuda
    sys.modules.pop("lightning_gradclip.gradients.cuda", None)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if dtype is torch.float64 else torch.float32)


def product(values: Tensor, by: Tensor) -> Tensor:
    exact = values.to(by.dtype) * by
    if values.dtype is torch.bfloat16:
        # The interpreter cuts off where devices round.
        exact = exact.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    return exact.to(values.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.3, 7.0, 0.0, 1.0, math.nan])
def test_every_entry_is_multiplied_once(kernel: ModuleType, value: float, dtype: torch.dtype) -> None:
    block = kernel.PROGRAM
    shapes = [(1,), (), (7, 3), (0,), (block - 1,), (block,), (block + 1,), (3, block), (2 * block + 5,)]
    tensors = [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    by = factor(value, dtype)
    expected = [product(one, by) for one in tensors]
    guard = torch.ones(64, dtype=dtype)
    kernel.scale_(tensors, by)
    assert all(map(same_bits, tensors, expected)) or math.isnan(value)
    assert all(one.isnan().all() for one in tensors) or not math.isnan(value)
    assert [one._version for one in tensors] == [int(one.numel() > 0) for one in tensors]
    assert torch.equal(guard, torch.ones(64, dtype=dtype))


def test_only_its_own_part_of_a_buffer_is_written(kernel: ModuleType) -> None:
    buffer = torch.ones(4 * kernel.PROGRAM)
    kernel.scale_([buffer[1024:1029], buffer[2048 : 2048 + kernel.PROGRAM]], torch.tensor(0.5))
    assert buffer[1024:1029].tolist() == [0.5] * 5
    assert buffer[2048 : 2048 + kernel.PROGRAM].unique().tolist() == [0.5]
    assert buffer.sum().item() == 4 * kernel.PROGRAM - 0.5 * (5 + kernel.PROGRAM)


def test_a_coefficient_of_1_touches_no_memory(kernel: ModuleType) -> None:
    # A product with 1 would make a quiet NaN of this one.
    odd = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    kernel.scale_([odd], torch.tensor(1.0))
    assert odd.view(torch.int32).item() == 0x7F800001


def test_gradients_made_anew_are_found(kernel: ModuleType) -> None:
    for seed in range(3):
        tensors = [drawn(300, dtype=torch.float32, seed=seed), drawn(20, dtype=torch.float32, seed=seed)]
        expected = [one * torch.tensor(0.3) for one in tensors]
        kernel.scale_(tensors, torch.tensor(0.3))
        assert all(map(same_bits, tensors, expected))


def test_what_it_is_not_made_for_is_left(kernel: ModuleType) -> None:
    whole = torch.ones(4, 8, 8, 8)
    assert kernel.fits(whole)
    assert kernel.fits(whole.to(memory_format=torch.channels_last))
    assert kernel.fits(torch.tensor(1.0))
    for odd in (whole.transpose(0, 1), whole[:, ::2], whole.view(-1)[1:], whole.long(), torch.ones(1).expand(3)):
        assert not kernel.fits(odd)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_it_is_tried_before_it_is_used(kernel: ModuleType, dtype: torch.dtype) -> None:
    foreach._kernel.cache_clear()
    assert foreach._kernel(CPU, dtype) is kernel
    foreach._kernel.cache_clear()


def test_a_kernel_with_other_numbers_than_torch_is_not_used(kernel: ModuleType) -> None:
    foreach._kernel.cache_clear()
    with pytest.warns(UserWarning, match="it gives other numbers than torch"):
        # In the interpreter that is so for bfloat16.
        assert foreach._kernel(CPU, torch.bfloat16) is None
    foreach._kernel.cache_clear()


def test_a_kernel_that_cannot_be_built_is_not_used(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    del kernel
    foreach._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "lightning_gradclip.gradients.cuda", None)
    with pytest.warns(UserWarning, match=r"cannot be used on cpu \(ModuleNotFoundError.*repair Triton, or leave"):
        assert foreach._kernel(CPU, torch.float32) is None
    foreach._kernel.cache_clear()


class TestAsking:
    """Until a GPU has shown what it gains, torch's own function is the default, also where Triton is installed."""

    def test_nobody_asks_by_default(self) -> None:
        assert not Options(NormClip()).triton

    @needs("triton", extra="dev")
    def test_an_argument_or_the_environment_asks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert Options(NormClip(), triton=True).triton
        for value, asks in (("1", True), ("0", False), ("", False)):
            monkeypatch.setenv("LIGHTNING_GRADCLIP_TRITON", value)
            assert Options(NormClip()).triton is asks

    def test_another_word_in_the_environment_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIGHTNING_GRADCLIP_TRITON", "yes")
        with pytest.raises(ValueError, match="LIGHTNING_GRADCLIP_TRITON must be 0 or 1, got 'yes'"):
            Clipper([("w", torch.nn.Parameter(torch.ones(3)))], NormClip())

    @pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
    def test_it_is_refused_where_triton_is_missing(self) -> None:
        with pytest.raises(ValueError, match="triton=True asks for a kernel of Triton, which is not installed"):
            Options(NormClip(), triton=True)


def test_tensors_on_other_devices_are_left() -> None:
    tensors = [torch.ones(LAUNCH), torch.ones(3, dtype=torch.float64)]
    assert foreach.left_by_kernel_(tensors, torch.tensor(0.5)) == tensors
    assert tensors[0][0].item() == 1.0
