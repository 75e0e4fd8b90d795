"""Ranks that hold different parameters: stages of a pipeline, local experts, and their norms as one."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from kit import workers
from kit.pieces import communicated, digest, mesh, plain, random, whole
from kit.sharded import shown
from lightning_gradclip import (
    AGC,
    ClipMethod,
    Clipper,
    EmaClip,
    Normalize,
    NormClip,
    QuantileClip,
    SigmaClip,
    ValueClip,
    ZClip,
)

pytestmark = pytest.mark.distributed

WIDE = torch.float64
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "scale": ()}
STEPS = 8

METHODS: dict[str, tuple[ClipMethod, dict[str, Any]]] = {
    **{f"norm {per}": (NormClip(max_norm=0.9, per=per), {}) for per in NormClip.scopes},
    "norm of p 3": (NormClip(max_norm=0.9, norm_type=3.0, per="layer"), {}),
    "largest": (NormClip(max_norm=0.9, norm_type=math.inf), {}),
    "power 8": (NormClip(max_norm=0.9, norm_type=8.0), {}),
    "rms": (NormClip(max_norm=0.1, statistic="rms"), {}),
    "value": (ValueClip(max_value=0.4), {}),
    "normalize": (Normalize(per="layer"), {}),
    "agc": (AGC(clip_factor=0.5), {}),
    "agc parameter": (AGC(clip_factor=0.5, per="parameter"), {}),
    **{f"quantile {per}": (QuantileClip(q=0.6, window=4, per=per), {}) for per in ("model", "parameter")},
    "sigma": (SigmaClip(k=1.0, window=5, warmup=3, per="layer"), {}),
    "zclip": (ZClip(warmup=3, z_threshold=0.5, per="parameter"), {}),
    "ema": (EmaClip(warmup=3, beta=0.9, per="parameter"), {}),
    "skip": (QuantileClip(q=0.6, window=4), {"action": "skip"}),
    "skip parameter": (NormClip(max_norm=2.0, per="parameter"), {"action": "skip"}),
    "observe": (NormClip(max_norm=0.9), {"action": "observe"}),
}


def stage(number: int, seed: int) -> dict[str, Tensor]:
    """Numbers for what a stage holds; only the first has the scale."""
    names = [name for name in SHAPES if not (number and name == "scale")]
    return {name: random(*SHAPES[name], seed=100 * seed + 10 * number + i, dtype=WIDE) for i, name in enumerate(names)}


def weights(number: int) -> dict[str, Tensor]:
    """The same on both, as where each process has seeded itself alike and made its own."""
    return {name: random(*one.shape, dtype=WIDE) for name, one in stage(number, 0).items()}


def label(number: int, name: str) -> str:
    return name if name == "scale" else f"rank{number}.{name}"


def taken(clipper: Clipper, params: dict[str, Any], gradients: Any) -> Any:
    """What some steps have left."""
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step")
        for step in range(STEPS):
            for name, gradient in gradients(step).items():
                params[name].grad = None if gradient is None else gradient.clone()
            stats = shown(clipper.step())
            of_scopes = {name: stats.pop(name) for name in ("sizes", "limits")}
            names = clipper._limiter.scopes.names
            found.append((stats, {key: dict(zip(names, one.tolist(), strict=True)) for key, one in of_scopes.items()}))
    left = {name: None if one.grad is None else whole(one.grad).clone() for name, one in params.items()}
    return found, left, clipper.metrics(), clipper.state_dict()


class TestStages:
    def test_every_method_does_what_one_process_does(self) -> None:
        """The last stage has no gradient of its bias in some steps, and in one none at all."""

        def gradients(number: int, step: int) -> dict[str, Tensor | None]:
            factor = 1.0 + 2.0 * (step % 3)
            given: dict[str, Tensor | None] = {name: factor * one for name, one in stage(number, 1 + step).items()}
            if number and step in (2, 3):
                given["0.bias"] = None
            return dict.fromkeys(given) if number and step == 5 else given

        def work(rank: int) -> Any:
            mesh(2)
            found = {}
            for name, (method, options) in METHODS.items():
                params = {key: Parameter(one) for key, one in weights(rank).items()}
                clipper = Clipper(
                    params.items(), method, process_group=dist.group.WORLD, measure_per="layer", **options
                )
                found[name] = taken(clipper, params, lambda step: gradients(rank, step))
            return found

        answers = workers.run(work)
        for name, (method, options) in METHODS.items():
            both = {label(number, key): one for number in (0, 1) for key, one in weights(number).items()}
            params = {key: Parameter(one) for key, one in both.items()}
            clipper = Clipper(params.items(), method, measure_per="layer", **options)
            steps, left, metrics, state = taken(
                clipper,
                params,
                lambda step: {label(n, key): one for n in (0, 1) for key, one in gradients(n, step).items()},
            )
            first, second = (answer[name] for answer in answers)
            assert digest(first[0], first[2:]) == digest(second[0], second[2:]), name
            torch.testing.assert_close(first[0], steps, rtol=1e-6, atol=1e-9, equal_nan=True)
            assert first[2] == pytest.approx(metrics, rel=1e-6), name
            assert sorted(first[3]["learned"]["scopes"]) == sorted(state["learned"]["scopes"])
            for number, (_, own, *_) in enumerate((first, second)):
                for key, one in own.items():
                    torch.testing.assert_close(one, left[label(number, key)], rtol=1e-6, atol=1e-12)

    def test_stages_that_are_sharded(self) -> None:
        """Two stages of two ranks each, called alike, by any name of the ranks that are apart."""
        layers = [random(6, 6, seed=i, dtype=WIDE) for i in range(4)]
        cases = [NormClip(max_norm=0.1), NormClip(max_norm=0.1, per="parameter"), AGC(), ValueClip(max_value=0.1)]

        def made(number: int) -> nn.Sequential:
            found = nn.Sequential(*(nn.Linear(6, 6, bias=False, dtype=WIDE) for _ in range(2)))
            for i, one in enumerate(found):
                one.weight.data.copy_(layers[2 * number + i])
            return found

        def backward(number: int, module: nn.Module, part: Any = slice(None)) -> None:
            module.zero_grad()
            (module(random(8, 6, seed=number, dtype=WIDE)[part]).square().mean() * 9).backward()

        def work(rank: int) -> Any:
            mesh(4)
            there = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
            number = there.get_local_rank("pp")
            module = fully_shard(made(number), mesh=there["fsdp"])
            part = slice(4 * (rank % 2), 4 * (rank % 2) + 4)
            found = []
            for method in cases:
                for group in (there["pp"], there["pp"].get_group()):
                    backward(number, module, part)
                    clipper = Clipper(module, method, process_group=group)
                    stats, first = communicated(clipper)
                    left = [whole(one.grad) for one in module.parameters()]
                    found.append((stats.norm.item(), sorted(stats.sizes.tolist()), first, communicated(clipper)[1]))
                    found[-1] += (left,)
            return found

        answers = workers.run(work, world=4)
        modules = [made(0), made(1)]
        for i, method in enumerate(cases):
            for number in (0, 1):
                backward(number, modules[number])
            named = {f"{n}.{key}": one for n in (0, 1) for key, one in modules[n].named_parameters()}
            stats = Clipper(named.items(), method).step()
            for rank, answer in enumerate(answers):
                for norm, sizes, first, second, left in answer[2 * i : 2 * i + 2]:
                    assert norm == pytest.approx(stats.norm.item(), rel=1e-6)
                    assert sizes == pytest.approx(sorted(stats.sizes.tolist()), rel=1e-6)
                    # Of float64 all are gathered; the first time another look at which are copies.
                    assert (first, second) == ({"c10d.allgather_": 2}, {"c10d.allgather_": 1})
                    expected = [one.grad for one in modules[rank // 2].parameters()]
                    torch.testing.assert_close(left, expected, rtol=1e-6, atol=1e-12)

    def test_a_pattern_has_to_match_on_some_stage(self) -> None:
        def work(rank: int) -> Any:
            mesh(2)
            pairs = list(plain(stage(rank, 1), weights(rank)))
            norm = Clipper(pairs, NormClip(), include="scale", process_group=dist.group.WORLD).step().norm.item()
            said = []
            for options in ({"include": "nothing.*"}, {"exclude": "*"}):
                with pytest.raises(ValueError, match=r"matches no parameter|leave no parameter") as error:
                    Clipper(pairs, NormClip(), process_group=dist.group.WORLD, **options)
                said.append(str(error.value))
            return norm, said

        first, second = workers.run(work)
        assert first[0] == second[0] == pytest.approx(stage(0, 1)["scale"].abs().item())
        assert "include='nothing.*'" in first[1][0]
        assert first[1][1] == second[1][1]

    def test_parameters_that_join_and_state_that_goes_on(self) -> None:
        def work(rank: int) -> Any:
            mesh(2)
            params = {key: Parameter(one) for key, one in weights(rank).items()}
            optimizer = SGD([params["0.weight"]], lr=0.1)

            def made() -> Clipper:
                method = EmaClip(warmup=1, per="parameter")
                return Clipper(params.items(), method, optimizer=optimizer, process_group=dist.group.WORLD)

            def step(clipper: Clipper, seed: int) -> float:
                for key, one in stage(rank, seed).items():
                    params[key].grad = one
                return clipper.step().norm.item()

            clipper = made()
            found = [step(clipper, 1)]
            optimizer.add_param_group({"params": [params["0.bias"]]})
            found += [step(clipper, 2), step(clipper, 3)]
            again = made()
            again.load_state_dict(clipper.state_dict())
            assert step(clipper, 4) == step(again, 4)
            return found, digest(clipper.state_dict()["learned"]), digest(again.state_dict()["learned"])

        first, second = workers.run(work)
        assert first == second
        assert first[1] == first[2]
        for seed, names in ((1, ["0.weight"]), (2, ["0.weight", "0.bias"]), (3, ["0.weight", "0.bias"])):
            all_of_them = torch.cat([stage(number, seed)[name].flatten() for number in (0, 1) for name in names])
            assert first[0][seed - 1] == pytest.approx(all_of_them.norm().item(), rel=1e-6)

    def test_a_group_that_is_none_or_without_this_rank(self) -> None:
        def work(rank: int) -> list[str]:
            mesh(2)
            alone = dist.new_group([0])
            pairs = plain(stage(rank, 1), weights(rank))
            said = []
            for group in ("pp", 3, *([alone] if rank else [])):
                with pytest.raises((TypeError, ValueError), match="process_group") as error:
                    Clipper(pairs, NormClip(), process_group=group)
                said.append(str(error.value))
            return said

        first, second = workers.run(work)
        assert first == second[:2]
        assert all("write process_group=mesh['pp']" in one for one in first)
        assert "this one, 1, is not among them" in second[2]


class Experts(nn.Module):
    """A dense layer that all ranks have and one expert that only this one has, called alike everywhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4, dtype=WIDE)
        self.expert = nn.Linear(4, 4, dtype=WIDE)
        for i, one in enumerate(self.parameters()):
            one.data.copy_(random(*one.shape, seed=i + (seed if i > 1 else 0), dtype=WIDE))

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(torch.relu(self.dense(x)))


def expected_norms(modules: list[nn.Module], per: str) -> list[float]:
    """Of the dense layer once, of the expert of each."""
    params = list(modules[0].named_parameters())[:2]
    params += [(f"rank{i}.{name}", one) for i, module in enumerate(modules) for name, one in module.named_parameters()][
        2:
    ]
    named = {name: one for name, one in params if "dense" not in name or not name.startswith("rank")}
    return sorted(Clipper(named.items(), NormClip(max_norm=1e9, per=per)).step().sizes.tolist())


class TestExperts:
    @pytest.mark.parametrize("alike", [True, False])
    def test_local_ones_beside_copies(self, alike: bool) -> None:
        """Under DDP, which leaves the experts alone; made alike by a common seed, or not."""

        def gradients(rank: int) -> Experts:
            module = Experts(0 if alike else 50 * rank)
            for i, one in enumerate(module.parameters()):
                one.grad = random(*one.shape, seed=10 * i + (rank if i > 1 else 0), dtype=WIDE)
            return module

        def work(rank: int) -> Any:
            mesh(2)
            module = gradients(rank)
            found = []
            for per in ("model", "parameter"):
                clipper = Clipper(module, NormClip(max_norm=1e9, per=per), process_group=dist.group.WORLD)
                found.append(sorted(clipper.step().sizes.tolist()))
            left = [one.grad for one in module.parameters()]
            Clipper(module, NormClip(max_norm=0.1, per="parameter"), process_group=dist.group.WORLD).step()
            norms = [one.norm().item() for one in left]
            return found, norms

        answers = workers.run(work)
        for i, per in enumerate(("model", "parameter")):
            for found, norms in answers:
                assert found[i] == pytest.approx(expected_norms([gradients(0), gradients(1)], per), rel=1e-6)
                assert norms == pytest.approx([0.1] * 4, rel=1e-4)

    def test_a_copy_that_had_no_gradient_at_first(self) -> None:
        """As the first matrix of LoRA, whose second one is zero; until it has one it counts nothing."""

        def work(rank: int) -> list[float]:
            mesh(2)
            copy, own = Parameter(random(3, dtype=WIDE)), Parameter(random(3, dtype=WIDE))
            clipper = Clipper([("copy", copy), ("own", own)], NormClip(max_norm=1e9), process_group=dist.group.WORLD)
            norms = []
            for step in range(5):
                copy.grad = random(3, seed=step, dtype=WIDE) * (step > 0)
                own.grad = random(3, seed=50 + rank, dtype=WIDE)
                norms.append(clipper.step().norm.item())
            return norms

        first, second = workers.run(work)
        assert first == second
        for step, norm in enumerate(first):
            parts = [random(3, seed=50, dtype=WIDE), random(3, seed=51, dtype=WIDE)]
            parts += [random(3, seed=step, dtype=WIDE)] * (step > 0)
            assert norm == pytest.approx(torch.cat(parts).norm().item(), rel=1e-6)

    def test_on_a_mesh_of_their_own(self) -> None:
        """The dense layer is sharded over all ranks; each expert over two of them, with a divisor of its own."""

        def gradients(expert: int, rank: int | None = None) -> nn.Module:
            module = Experts(50 * expert)
            rows = random(8, 4, seed=3, dtype=WIDE)
            mine = rows if rank is None else rows[2 * rank : 2 * rank + 2]
            return module, mine

        def work(rank: int) -> Any:
            mesh(4)
            there = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "efsdp"))
            module, rows = gradients(there.get_local_rank("ep"), rank)
            fully_shard(module.expert, mesh=there["efsdp"])
            module.expert.set_gradient_divide_factor(4.0)
            fully_shard(module, mesh=mesh(4))
            module(rows).square().sum().backward()
            sizes = []
            for per in ("model", "parameter"):
                clipper = Clipper(module, NormClip(max_norm=1e9, per=per), process_group=there["ep"])
                sizes.append(sorted(clipper.step().sizes.tolist()))
                counts = communicated(clipper)[1]
            return sizes, counts, [whole(one.grad) for one in module.parameters()]

        answers = workers.run(work, world=4)
        dense, experts = answers[0][2][:2], [*answers[0][2][2:], *answers[2][2][2:]]
        norms = sorted(one.norm().item() for one in [*dense, *experts])
        for sizes, counts, _ in answers:
            assert sizes[1] == pytest.approx(norms, rel=1e-6)
            assert sizes[0] == pytest.approx([math.hypot(*norms)], rel=1e-6)
            assert counts == {"c10d.allgather_": 1}
        # And these are right: averaged over all ranks, or added up by two and divided by four.
        for which, got in ((0, answers[0][2]), (1, answers[2][2])):
            module, rows = gradients(which)
            module(rows[4 * which : 4 * which + 4]).square().sum().backward()
            torch.testing.assert_close(got[2], module.expert.weight.grad / 4, rtol=1e-6, atol=1e-12)


def test_copies_that_ddp_averages_and_those_that_it_ignores() -> None:
    """Ignored ones that are averaged otherwise are right, others are refused by name, or told apart."""

    def work(rank: int, averaged: bool, apart: bool) -> Any:
        mesh(2)
        module = Experts(0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["expert.weight", "expert.bias"])
        wrapped = DistributedDataParallel(module)
        wrapped(random(4, 4, seed=rank, dtype=WIDE)).square().sum().backward()
        if averaged:
            for one in module.expert.parameters():
                dist.all_reduce(one.grad, op=dist.ReduceOp.SUM)
                one.grad /= 2
        found = []
        for given in (wrapped, module):
            clipper = Clipper(given, NormClip(max_norm=1e9), process_group=dist.group.WORLD if apart else None)
            try:
                found.append(clipper.step().norm.item())
            except RuntimeError as error:
                found.append(str(error))
        return found, [one.grad for one in module.parameters()]

    for averaged, apart in ((True, False), (False, False), (False, True), (True, True)):
        first, second = workers.run(work, averaged, apart)
        assert first[0] == second[0]
        if not averaged and not apart:
            for said in first[0]:
                assert "gradients of 'expert.weight', 'expert.bias' differ between ranks 0, 1" in said
                assert "process_group=" in said
            continue
        different = [*first[1], *(() if averaged else second[1][2:])]
        norm = math.hypot(*(one.norm().item() for one in different))
        assert first[0] == pytest.approx([norm, norm], rel=1e-6)
