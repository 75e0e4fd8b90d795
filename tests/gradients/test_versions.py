"""Gradients that were written since are found, whatever they are and however it was done, and no others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kit import workers
from lightning_gradclip.gradients import versions


def parameters() -> list[Tensor]:
    """Of all kinds: plain, without a gradient, half, complex, sparse, from inference mode."""
    made = [
        nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in (torch.float32,) * 2 + (torch.float16, torch.cfloat)
    ]
    for parameter in (made[0], *made[2:]):
        parameter.grad = torch.ones_like(parameter)
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1, 2, 2])).sum().backward()
    with torch.inference_mode():
        strange = torch.ones(4, 3)
    made += [embedding.weight, nn.Parameter(torch.ones(4, 3))]
    made[-1].grad = strange
    return made


def clear(params: list[Tensor]) -> None:
    params[0].grad = None


def give(params: list[Tensor]) -> None:
    params[1].grad = torch.ones_like(params[1])


def renew(params: list[Tensor]) -> None:
    params[2].grad = params[2].grad.clone()


WRITES: dict[str, tuple[Callable[[list[Tensor]], object], list[int]]] = {
    "in place": (lambda params: params[0].grad.mul_(1.0), [0]),
    "a view": (lambda params: params[0].grad.view(-1)[2:3].zero_(), [0]),
    "detached": (lambda params: params[3].grad.detach().mul_(2.0), [3]),
    "real part": (lambda params: torch.view_as_real(params[3].grad).zero_(), [3]),
    "many at once": (lambda params: torch._foreach_mul_([params[0].grad, params[2].grad], 2.0), [0, 2]),
    "sparse": (lambda params: params[4].grad.mul_(2.0), [4]),
    "by torch": (lambda params: nn.utils.clip_grad_value_(params[:4:2], 1e-3), [0, 2]),
    "removed": (clear, [0]),
    "given": (give, [1]),
    "replaced by its equal": (renew, [2]),
    "backward": (lambda params: params[0].sum().backward(), [0]),
    "read": (lambda params: [params[0].grad.norm(), params[4].grad.coalesce(), params[3].grad.abs().max()], []),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_is_found(write: str) -> None:
    params = parameters()
    then = versions.marks(params, others=False)
    assert versions.written_since(params, then, others=False) == []
    act, places = WRITES[write]
    act(params)
    assert versions.written_since(params, then, others=False) == places


def test_gradients_in_one_memory_count_together_unless_others_are_there_too() -> None:
    memory = torch.ones(2, 4, 3)
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    for parameter, gradient in zip(params, [*memory, torch.ones(4, 3)], strict=True):
        parameter.grad = gradient
    for others, found in ((False, [0, 1]), (True, [])):
        then = versions.marks(params, others=others)
        params[1].grad.mul_(0.5)
        assert versions.written_since(params, then, others=others) == found
    then = versions.marks(params, others=True)
    params[2].grad.mul_(0.5)
    params[0].grad = None
    assert versions.written_since(params, then, others=True) == [0, 2]


def _pieces(rank: int) -> list[list[int]]:
    mesh = init_device_mesh("cpu", (2,))
    params = [
        nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [how])) for how in (Shard(0), Replicate(), Shard(1))
    ]
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    found = []
    for write in (lambda: None, lambda: params[0].grad.mul_(0.5), lambda: params[2].grad.to_local().mul_(0.5)):
        then = versions.marks(params, others=False)
        write()
        found.append(versions.written_since(params, then, others=False))
    return found


@pytest.mark.distributed
def test_what_ranks_hold_of_gradients_is_looked_at() -> None:
    assert workers.run(_pieces) == [[[], [0], [2]]] * 2
