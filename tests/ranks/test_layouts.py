"""How parameters are laid out over ranks: what is refused, what is written, and odd cases of every kind."""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.optim import SGD, AdamW, Optimizer

from kit import layouts, workers
from kit.pieces import COLUMNS, ROWS, WHOLE, communicated, cut, digest, held, mesh, parameter, plain, random, whole
from kit.sharded import Spread, shown
from lightning_gradclip import AGC, ClipMethod, Clipper, Normalize, NormClip, ValueClip
from lightning_gradclip.act.fold import Fold

pytestmark = pytest.mark.distributed

needs_fsdp2 = pytest.mark.skipif(not layouts.FSDP2_ON_CPU, reason="this torch knows FSDP2 on GPUs only")


def flattened(module: nn.Module, **options: Any) -> nn.Module:
    """The module under FSDP1."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **{"use_orig_params": True, **options})


def backward(module: nn.Module, rank: int = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(random(4, 6, seed=rank)).square().sum().backward()


def message(error: type[Exception], make: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        make()
    return str(caught.value)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6, bias=False)
        self.unused = nn.Linear(5, 3)
        self.tiny = nn.Linear(6, 1)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tiny(self.head(self.embed(x)))


class TestRefusals:
    def test_what_fsdp_has_cut_or_joined_names_a_way_out(self) -> None:
        def work(rank: int) -> list[str]:
            apart, joined = flattened(layouts.net()), flattened(layouts.net(), use_orig_params=False)
            return [
                message(ValueError, lambda: Clipper(apart, AGC())),
                message(ValueError, lambda: Clipper(joined, AGC())),
                message(ValueError, lambda: Clipper(joined, NormClip(per="layer"))),
                message(ValueError, lambda: Clipper(joined, NormClip(per="parameter"))),
                message(ValueError, lambda: Clipper(joined, NormClip(), measure_per="parameter")),
                message(ValueError, lambda: Clipper(apart.named_parameters(), NormClip())),
                message(ValueError, lambda: Clipper(joined.named_parameters(), NormClip())),
                # Of another model.
                message(ValueError, lambda: Clipper(layouts.net(), NormClip(), optimizer=SGD(apart.parameters()))),
            ]

        first, second = workers.run(work)
        assert first == second
        units, units_joined, layer, single, measured, *named = first
        for said in (units, units_joined):
            assert "without regard to its rows" in said
            assert "fully_shard" in said
            assert "per='parameter'" in said
        for said in (layer, single, measured):
            assert "joined several parameters into '_flat_param'" in said
            assert "use_orig_params=True" in said
        for said in named:
            assert "is flattened by FSDP" in said
            assert "Clipper(model, ...)" in said

    def test_parameters_that_differ_between_ranks(self) -> None:
        def work(rank: int) -> list[str]:
            there = mesh(3)
            weight, bias = (parameter(random(6), None, there, ROWS) for _ in range(2))
            return [
                message(RuntimeError, lambda: Clipper([("a", weight), ("b" if rank else "c", bias)], NormClip())),
                message(RuntimeError, lambda: Clipper([("a", weight), ("b", bias)][: 1 + (rank < 2)], NormClip())),
                message(
                    RuntimeError, lambda: Clipper([("a", weight), ("b", bias)][:: -1 if rank == 2 else 1], NormClip())
                ),
            ]

        first, *others = workers.run(work, world=3)
        assert all(other == first for other in others)
        assert first[0].startswith("rank 1 serves 2 parameters and rank 0 2 with other names")
        assert first[1].startswith("rank 2 serves 1 parameters and rank 0 2")
        assert first[2].startswith("rank 2 serves 2 parameters and rank 0 2")
        assert all("in the same order, on every rank" in said for said in first)


class TestWrites:
    """What is written, and that nothing else is."""

    @pytest.mark.parametrize(
        "name", sorted({"fsdp1_full", "fsdp2", "tensor", "sequence", "fsdp2_left_out"} & layouts.SPREADS.keys())
    )
    def test_a_clipped_step_writes_each_piece_once(self, name: str) -> None:
        methods = [
            NormClip(max_norm=0.1),
            NormClip(max_norm=1e-3, per="parameter"),
            Normalize(),
            ValueClip(max_value=1e-6),
        ]
        methods += [AGC(clip_factor=1e-6, per="parameter")]
        if name != "fsdp1_full":
            methods.append(AGC(clip_factor=1e-6))

        def pieces(spread: Spread) -> list[Tensor]:
            return [piece for one in spread.params if one.grad is not None and (piece := held(one.grad)).numel()]

        def writes(spread: Spread, clipper: Clipper) -> list[float]:
            """Of each piece: pieces of one memory count together, and share it."""
            before = [(one.untyped_storage().data_ptr(), one._version) for one in pieces(spread)]
            clipper.step()
            sharing = Counter(memory for memory, _ in before)
            now = [one._version for one in pieces(spread)]
            return [(after - then) / sharing[memory] for after, (memory, then) in zip(now, before, strict=True)]

        def work(rank: int) -> Any:
            spread = Spread(name, rank)

            def serving(method: ClipMethod, **options: Any) -> Clipper:
                return Clipper(spread.module, method, optimizer=spread.optimizer, **options)

            # Gradients that are still to be added up are, so that they can be written.
            serving(NormClip(max_norm=1e9)).step()
            within = [
                NormClip(max_norm=1e9),
                NormClip(norm_type=math.inf, max_norm=1e9, per="layer"),
                ValueClip(max_value=1e9),
            ]
            found = [writes(spread, serving(method, measure_per="layer")) for method in within]
            for method in methods:
                spread.give()
                serving(NormClip(max_norm=1e9)).step()
                found.append(writes(spread, serving(method)))
            return found

        for found in workers.run(work):
            assert [set(one) for one in found] == [{0}] * 3 + [{1}] * len(methods)

    def test_observing_leaves_gradients_as_they_are(self) -> None:
        def work(rank: int) -> Any:
            spread = Spread("sequence", rank)
            given = [one.grad for one in spread.params]
            before = [held(one).clone() for one in given]
            partial = sum(any(way.is_partial() for way in getattr(one, "placements", ())) for one in given)
            for method in (None, NormClip(max_norm=0.1), ValueClip(max_value=0.01), AGC()):
                Clipper(spread.module, method, optimizer=spread.optimizer, action="observe", nonfinite="raise").step()
            same = [one.grad is gradient for one, gradient in zip(spread.params, given, strict=True)]
            equal = [torch.equal(held(gradient), values) for gradient, values in zip(given, before, strict=True)]
            return partial, same, equal

        for partial, same, equal in workers.run(work):
            assert partial == 2
            assert all(same)
            assert all(equal)

    def test_gradients_that_cannot_be_written_in_place_are_copied(self) -> None:
        weights = {"expanded": random(6, 4), "complex": random(6, 4, dtype=torch.complex64)}
        gradients = {"expanded": torch.ones(1, 4).expand(6, 4), "complex": random(6, 4, seed=1, dtype=torch.complex64)}

        def work(rank: int) -> Any:
            there = mesh(2)
            found = []
            for method in (NormClip(max_norm=0.1), NormClip(max_norm=0.1, per="parameter"), AGC()):
                pairs = [(name, parameter(one, None, there, ROWS)) for name, one in weights.items()]
                row = torch.ones(1, 4).expand(3, 4)
                conjugate = held(cut(gradients["complex"].conj().resolve_conj(), there, ROWS)).conj()
                assert conjugate.is_conj()
                for (_, one), piece in zip(pairs, (row, conjugate), strict=True):
                    one.grad = DTensor.from_local(piece, there, [ROWS], run_check=False)
                Clipper(pairs, method).step()
                found.append([held(one.grad) for _, one in pairs])
            return found

        # Not every backend gathers complex numbers.
        first = [
            [torch.cat(both) for both in zip(*pieces, strict=True)] for pieces in zip(*workers.run(work), strict=True)
        ]
        for method, ours in zip(
            (NormClip(max_norm=0.1), NormClip(max_norm=0.1, per="parameter"), AGC()), first, strict=True
        ):
            dense = plain({name: one.clone() for name, one in gradients.items()}, weights)
            Clipper(dense, method).step()
            torch.testing.assert_close(ours, [one.grad for _, one in dense], rtol=1e-6, atol=0.0)


class TestFold:
    """The coefficient goes to a fused optimizer, whose update is that of clipped gradients.

    Of its fused optimizers torch runs Adam and AdamW on DTensors, where all parameters are DTensors, and all under
    FSDP1.
    """

    @pytest.mark.parametrize(
        ("name", "fused"),
        [("fsdp1_full", "adamw"), ("fsdp1_full", "sgd"), pytest.param("fsdp2", "adamw", marks=needs_fsdp2)],
    )
    def test_equals_clipping_and_then_stepping(self, name: str, fused: str) -> None:
        def work(rank: int) -> Any:
            ends = []
            for fold in (False, True):
                spread = Spread(name, rank)
                before = layouts.whole(spread.module, gradients=False)
                ends.append(steps(spread.module, spread.give, FUSED[fused](spread.module.parameters()), fold))
                after = layouts.whole(spread.module, gradients=False)
                assert all(not torch.equal(after[key], before[key]) for key in after)
                ends.append(after)
            return ends

        for clipped, after, folded, after_too in workers.run(work):
            assert clipped == folded
            torch.testing.assert_close(after_too, after, rtol=1e-6, atol=1e-6)

    def test_equals_it_under_tensor_parallelism(self) -> None:
        gradients = [random(6, 4, seed=seed) for seed in range(3)]

        def work(rank: int) -> Any:
            there = mesh(2)
            ends = []
            for fold in (False, True):
                module = nn.Module()
                for i, way in enumerate((ROWS, COLUMNS, WHOLE)):
                    module.register_parameter(f"p{i}", parameter(random(6, 4, seed=9 + i), gradients[i], there, way))

                def give(factor: float, module: nn.Module = module) -> None:
                    for one, gradient, way in zip(module.parameters(), gradients, (ROWS, COLUMNS, WHOLE), strict=True):
                        one.grad = cut(gradient * factor, there, way)

                ends.append(steps(module, give, FUSED["adamw"](module.parameters()), fold))
                ends.append([whole(one.detach()) for one in module.parameters()])
            return ends

        for clipped, after, folded, after_too in workers.run(work):
            assert clipped == folded
            torch.testing.assert_close(after_too, after, rtol=1e-6, atol=1e-6)


def test_whether_the_host_decides_does_not_depend_on_the_gradients_of_a_rank() -> None:
    weight = nn.Parameter(torch.ones(3))
    for name, at_first, later in (("sgd", False, False), ("adamw", True, True)):
        optimizer = FUSED[name]([weight])
        fold = Fold(optimizer)
        found = []
        for gradient in (None, torch.ones(3), torch.ones(3)):
            weight.grad = gradient
            found.append(fold.can_leave_out(alike=True))
            optimizer.step()
        assert found == [at_first, later, later]


FUSED: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda params: AdamW(params, lr=0.1, fused=True),
    "sgd": lambda params: SGD(params, lr=0.1, momentum=0.9, fused=True),
}


def steps(module: nn.Module, give: Callable[[float], None], optimizer: Optimizer, fold: bool) -> dict[str, float]:
    clipper = Clipper(module, NormClip(max_norm=0.5), optimizer=optimizer, fold=fold)
    for factor in (1.0, 0.01, 4.0):
        give(factor)
        clipper.step()
        optimizer.step()
    metrics = clipper.metrics()
    assert metrics["clip_rate"] == pytest.approx(2 / 3)
    return metrics


class TestOddLayouts:
    def test_a_mesh_over_a_part_of_the_ranks(self) -> None:
        """The first two ranks train, a third one does something else; then each half trains a model of its own."""
        weights = {"weight": random(5, 3), "bias": random(5, seed=1)}

        def gradients(seed: int) -> dict[str, Tensor]:
            return {"weight": random(5, 3, seed=seed), "bias": random(5, seed=seed + 1)}

        def trained(there: Any, seed: int) -> Any:
            given = gradients(seed)
            pairs = [
                ("weight", parameter(weights["weight"], given["weight"], there, ROWS)),
                ("bias", parameter(weights["bias"], given["bias"])),
            ]
            stats = Clipper(pairs, NormClip(max_norm=0.1), measure_per="parameter").step()
            unit = Clipper(pairs, AGC(clip_factor=1e-3)).step()
            return shown(stats), shown(unit), [whole(one.grad) for _, one in pairs]

        def work(rank: int) -> Any:
            first = mesh(2)
            alone = trained(first, 5) if rank < 2 else None
            if rank == 2:
                # A parameter of which nothing is here.
                pairs = [("weight", parameter(weights["weight"], None, first, ROWS))]
                assert communicated(Clipper(pairs, NormClip()))[1] == {}
            dist.barrier()
            from torch.distributed.device_mesh import DeviceMesh

            halves = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
            with warnings.catch_warnings():
                # Two models of which nobody knows that they are: that is said.
                warnings.filterwarnings("ignore", "ranks clip by norms of their own", RuntimeWarning)
                answer = alone, trained(halves[rank // 2], rank // 2)
            # The first rank keeps what the others meet by.
            dist.barrier()
            return answer

        answers = workers.run(work, world=4)

        def expected(seed: int) -> Any:
            dense = plain(gradients(seed), weights)
            stats = Clipper(dense, NormClip(max_norm=0.1), measure_per="parameter").step()
            unit = Clipper(dense, AGC(clip_factor=1e-3)).step()
            return shown(stats), shown(unit), [one.grad for _, one in dense]

        for rank, (alone, half) in enumerate(answers):
            if rank < 2:
                torch.testing.assert_close(alone, expected(5), rtol=1e-6, atol=1e-9, equal_nan=True)
            torch.testing.assert_close(half, expected(rank // 2), rtol=1e-6, atol=1e-9, equal_nan=True)

    def test_copies_of_a_part_of_a_mesh(self) -> None:
        """Tensor parallel on one dimension of a mesh while DDP averages along the other: one sum over all ranks."""
        weights = {"weight": random(5, 3), "bias": random(5, seed=1)}
        gradients = {"weight": random(5, 3, seed=2), "bias": random(5, seed=3)}

        def work(rank: int) -> Any:
            there = mesh(2, 2)
            pairs = [
                ("weight", parameter(weights["weight"], gradients["weight"], there["tensor"], COLUMNS)),
                ("bias", parameter(weights["bias"], gradients["bias"], there, WHOLE, ROWS)),
            ]
            stats, counts = communicated(Clipper(pairs, NormClip(max_norm=0.1, statistic="rms")))
            return stats.sizes, counts, [whole(one.grad) for _, one in pairs]

        first, *others = workers.run(work, world=4)
        assert all(digest(first) == digest(other) for other in others)
        dense = plain(gradients, weights)
        stats = Clipper(dense, NormClip(max_norm=0.1, statistic="rms")).step()
        # Once the ranks look whether the weight is the same on both parts of the mesh.
        assert first[1] == {"c10d.allreduce_": 1, "c10d.allgather_": 1}
        torch.testing.assert_close(first[0], stats.sizes, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(first[2], [one.grad for _, one in dense], rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("world", [2, 3])
    def test_joined_parameters_of_fsdp_count_their_padding_as_nothing(self, world: int) -> None:
        def work(rank: int) -> Any:
            found = []
            for original in (True, False):
                module = flattened(layouts.net(), use_orig_params=original)
                backward(module, rank)
                reading = Clipper(module, NormClip(max_norm=0.01, statistic="rms"))
                stats = reading.step()
                entries = Clipper(module, ValueClip(max_value=1e-5)).step()
                found.append((stats.sizes.item(), stats.norm.item(), entries.clipped.item(), entries.norm.item()))
            return found

        for apart, joined in workers.run(work, world=world):
            assert joined == pytest.approx(apart, rel=1e-6)
            count = sum(one.numel() for one in layouts.net().parameters())
            assert apart[0] == pytest.approx(apart[1] / math.sqrt(count), rel=1e-6)

    def test_one_rank_under_fsdp_holds_whole_rows(self) -> None:
        def work(rank: int) -> Any:
            module = flattened(layouts.net())
            backward(module)
            stats, counts = communicated(Clipper(module, AGC(clip_factor=0.1)))
            return stats.sizes, counts

        [(sizes, counts)] = workers.run(work, world=1)
        module = layouts.net()
        backward(module)
        torch.testing.assert_close(sizes, Clipper(module, AGC(clip_factor=0.1)).step().sizes)
        assert counts == {}

    @needs_fsdp2
    def test_unused_modules_and_tied_weights_under_fsdp(self) -> None:
        def net() -> nn.Module:
            torch.manual_seed(0)
            return Tied()

        def work(rank: int) -> Any:
            found = []
            for way in (flattened, lambda one: fully_shard(one, mesh=mesh(2))):
                module = net()
                # On its own: FSDP makes zeros of what is missing beside other gradients.
                module.unused = way(module.unused)
                module = way(module)
                backward(module)
                missing = sum(one.grad is None for one in module.parameters())
                clipper = Clipper(module, NormClip(max_norm=0.1, per="parameter"), measure_per="layer")
                stats = clipper.step()
                found.append((shown(stats), clipper.metrics(), missing))
            return found

        first, second = workers.run(work)
        module = net()
        backward(module)
        clipper = Clipper(module, NormClip(max_norm=0.1, per="parameter"), measure_per="layer")
        expected = shown(clipper.step())
        metrics = clipper.metrics()
        assert "norm/unused" not in metrics
        for one, other in zip(first, second, strict=True):
            assert digest(one[:2]) == digest(other[:2])
            torch.testing.assert_close(one[0], expected, rtol=1e-6, atol=1e-9, equal_nan=True)
            assert one[1] == pytest.approx(metrics, rel=1e-6)
        # Under FSDP1 a rank lacks the gradients that lie on the other.
        assert first[0][2] + second[0][2] > 4

    def test_sparse_scalar_empty_and_later_parameters_beside_sharded_ones(self) -> None:
        weights = {
            "table.weight": random(6, 4),
            "table.rows": random(6, 4, seed=9),
            "layer.weight": random(3, 4, seed=1),
            "scale": random(seed=2),
            "nothing": random(0, 4),
            "short": random(1, 4, seed=3),
        }
        gradients = {name: random(*one.shape, seed=5 + i) for i, (name, one) in enumerate(weights.items())}
        gradients["table.weight"] = torch.sparse_coo_tensor(
            torch.tensor([[1, 4, 1]]), random(3, 4, seed=20), (6, 4), check_invariants=True
        )
        later = list(weights)[4:]

        def steps(pairs: Any, gather: Callable[[Any], Any]) -> Any:
            now = dict(pairs)
            found = []
            for method in (
                NormClip(max_norm=0.1, per="layer"),
                AGC(),
                ValueClip(max_value=0.1),
                NormClip(norm_type=3.0),
            ):
                given = {name: one.grad.clone() for name, one in now.items()}
                optimizer = SGD([one for name, one in pairs if name not in later], lr=0.1)
                clipper = Clipper(pairs, method, optimizer=optimizer, measure_per="parameter")
                found.append((shown(clipper.step()), clipper.metrics()))
                for name, one in now.items():
                    one.grad = given[name].clone()
                optimizer.add_param_group({"params": [now[name] for name in later]})
                found.append((shown(clipper.step()), clipper.metrics()))
                found.append([gather(one.grad) for one in now.values()])
                for name, one in now.items():
                    one.grad = given[name]
            return found

        def work(rank: int) -> Any:
            there = mesh(2)
            ways = {"table.rows": ROWS, "layer.weight": COLUMNS, "scale": WHOLE, "nothing": ROWS, "short": ROWS}
            pairs = [
                (name, parameter(one, gradients[name], *((there, ways[name]) if name in ways else ())))
                for name, one in weights.items()
            ]
            return steps(pairs, lambda one: whole(one).to_dense())

        first, second = workers.run(work)
        assert digest(first) == digest(second)
        expected = steps(plain(gradients, weights), lambda one: one.to_dense())
        torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-9, equal_nan=True)

    def test_a_partial_gradient_of_a_cut_parameter(self) -> None:
        def work(rank: int) -> Any:
            there = mesh(2)
            found = []
            for way in (ROWS, COLUMNS, WHOLE):
                one = parameter(random(5, 4), None, there, way)
                one.grad = DTensor.from_local(random(5, 4, seed=1 + rank), there, [Partial()], run_check=False)
                stats = Clipper([("weight", one)], NormClip(max_norm=0.1)).step()
                assert one.grad.placements == one.placements
                found.append((stats.norm.item(), whole(one.grad)))
            return found

        total = random(5, 4, seed=1) + random(5, 4, seed=2)
        for found in workers.run(work):
            for norm, after in found:
                assert norm == pytest.approx(total.norm().item(), rel=1e-6)
                torch.testing.assert_close(after, total * (0.1 / (norm + 1e-6)), rtol=1e-6, atol=0.0)

    def test_hybrid_sharding_and_parameters_that_fsdp_ignores(self) -> None:
        def work(rank: int) -> Any:
            inner = layouts.net()
            module = flattened(
                inner,
                sharding_strategy=ShardingStrategy.HYBRID_SHARD,
                device_mesh=mesh(2, 2),
                ignored_states=[inner.head.weight],
            )
            backward(module)
            clipper = Clipper(module, NormClip(max_norm=0.1), measure_per="parameter")
            stats = clipper.step()
            return stats.norm.item(), clipper.metrics()

        answers = workers.run(work, world=4)
        assert all(answer == answers[0] for answer in answers)
        module = layouts.net()
        backward(module)
        clipper = Clipper(module, NormClip(max_norm=0.1), measure_per="parameter")
        assert answers[0][0] == pytest.approx(clipper.step().norm.item(), rel=1e-6)
        assert answers[0][1] == pytest.approx(clipper.metrics(), rel=1e-6)
