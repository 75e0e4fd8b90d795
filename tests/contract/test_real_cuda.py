"""The same promises where there is CUDA: torch itself says when the host waits, and half precision overflows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from kit.methods import SUBJECTS, subject
from lightning_gradclip import ClipMethod, Clipper, NormClip
from lightning_gradclip.gradients import foreach
from lightning_gradclip.gradients.norms import LAUNCH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Loop:
    """A small network in a plain loop on the device."""

    def __init__(
        self, method: ClipMethod, make: Callable[[Any], Optimizer], scaler: GradScaler | None = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).cuda()
        self.optimizer = make(self.net.parameters())
        self.scaler = GradScaler("cuda", enabled=False) if scaler is None else scaler
        self.clipper = Clipper(self.net.named_parameters(), method, optimizer=self.optimizer, **options)
        self._seed = 0

    def backward(self) -> None:
        self._seed += 1
        inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(self._seed)).cuda()
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=self.scaler.is_enabled()):
            loss = (self._seed % 5 + 1) * self.net(inputs).float().square().mean()
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        self.backward()
        self.clipper.step(self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize(("cls", "per"), SUBJECTS)
def test_the_host_does_not_wait(cls: type[ClipMethod], per: str) -> None:
    loop = Loop(subject(cls, per), SGD, nonfinite="ignore", measure_per="layer")
    loop.step()
    for _ in range(2):
        loop.backward()
        with no_waiting():
            stats = loop.clipper.step()
        assert stats.norm.item() > 0


def large_gradients(dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """So many entries that the kernel takes them, in whole blocks, in parts of one, and where it cannot."""
    whole = torch.randn(LAUNCH + 5, device="cuda").to(dtype)
    gradients = [whole, whole[:1001].clone(), whole.clone()[1:1001], torch.randn(70, 90, device="cuda").to(dtype).t()]
    made = [(f"w{i}", nn.Parameter(torch.zeros_like(one))) for i, one in enumerate(gradients)]
    for (_, parameter), one in zip(made, gradients, strict=True):
        parameter.grad = one
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_multiplies_as_torch_does(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    device = torch.device("cuda", torch.cuda.current_device())
    assert foreach._kernel(device, dtype) is not None
    for value in (0.3, 1.0, 0.0, 7.5):
        tensors = [parameter.grad for _, parameter in large_gradients(dtype)]
        coef = torch.tensor(value, dtype=wide, device=device)
        expected = [one * coef for one in tensors]
        fitting = [one for one in tensors if foreach._kernel(device, dtype).fits(one)]
        with no_waiting():
            left = foreach.left_by_kernel_(tensors, coef)
        assert len(left) + len(fitting) == len(tensors)
        for one in left:
            one.mul_(coef)
        assert all(map(torch.equal, tensors, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.5, 2.0], ids=["over", "within"])
@pytest.mark.parametrize("triton", [False, True])
def test_a_step_over_large_gradients_does_not_wait_and_clips(dtype: torch.dtype, share: float, triton: bool) -> None:
    if triton:
        pytest.importorskip("triton", reason="triton is not installed")
    foreach._kernel.cache_clear()
    for _ in range(3):
        pairs = large_gradients(dtype)
        before = [parameter.grad.clone() for _, parameter in pairs]
        norm = torch.stack([one.double().norm() for one in before]).norm().item()
        clipper = Clipper(pairs, NormClip(max_norm=share * norm), nonfinite="ignore", triton=triton)
        clipper.step()
        for (_, parameter), one in zip(pairs, before, strict=True):
            parameter.grad = one.clone(memory_format=torch.preserve_format)
        with no_waiting():
            clipper.step()
        for (_, parameter), one in zip(pairs, before, strict=True):
            tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(parameter.grad, one * min(1.0, share), rtol=tolerance, atol=0)
            assert share < 1 or torch.equal(parameter.grad, one)
    assert foreach._kernel.cache_info().currsize == int(triton)


@pytest.mark.parametrize("action", ["clip", "skip"])
def test_folding_does_not_wait(action: str) -> None:
    loop = Loop(NormClip(max_norm=1e3), lambda params: AdamW(params, fused=True), action=action, fold=True)
    loop.step()
    for _ in range(2):
        loop.backward()
        with no_waiting():
            loop.clipper.step()
            loop.optimizer.step()
    assert loop.clipper.metrics()["skipped"] == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SGD(params, lr=1e-2),
        lambda params: SGD(params, lr=1e-2, fused=True),
        lambda params: AdamW(params, lr=1e-3, fused=True),
    ],
    ids=["sgd", "fused sgd", "fused adamw"],
)
@pytest.mark.parametrize("fold", [False, True])
def test_half_precision_with_a_real_scaler(make: Callable[[Any], Optimizer], fold: bool) -> None:
    probe = make([nn.Parameter(torch.zeros(1, device="cuda"))])
    if fold and not probe.param_groups[0].get("fused"):
        with pytest.raises(ValueError, match="would ignore it"):
            Loop(NormClip(), make, fold=True)
        return
    # So large a scale overflows float16 at first.
    scaler = GradScaler("cuda", init_scale=2.0**24, growth_interval=10**6)
    ours = Loop(NormClip(max_norm=0.5), make, scaler, fold=fold)
    theirs = Loop(NormClip(max_norm=0.5), make, GradScaler("cuda", init_scale=2.0**24, growth_interval=10**6))
    for _ in range(30):
        ours.step()
        theirs.backward()
        theirs.scaler.unscale_(theirs.optimizer)
        nn.utils.clip_grad_norm_(theirs.net.parameters(), 0.5)
        theirs.scaler.step(theirs.optimizer)
        theirs.scaler.update()
    assert ours.scaler.get_scale() == theirs.scaler.get_scale() < 2.0**24
    metrics = ours.clipper.metrics()
    assert metrics["overflows"] > 0
    assert metrics["clip_rate"] > 0
    for one, other in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
