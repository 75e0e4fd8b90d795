"""Whether ranks hold copies, and clip alike: what is not is refused, or said, on the ranks that can know."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from kit import layouts, workers
from kit.pieces import COLUMNS, ROWS, WHOLE, communicated, mesh, parameter, plain, random, whole
from lightning_gradclip import AGC, Clipper, Normalize, NormClip, QuantileClip, ValueClip

pytestmark = pytest.mark.distributed


def told(clipping: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        clipping()
    return str(error.value)


def groups() -> int:
    """How many process groups this rank has."""
    return len(dist.distributed_c10d._world.pg_map)


class TestStagesWithoutAGroup:
    @pytest.mark.parametrize("seeded", ["alike", "apart"])
    def test_sharded_ones_are_refused_by_name(self, seeded: str) -> None:
        def work(rank: int) -> Any:
            mesh(4)
            there = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
            torch.manual_seed(there.get_local_rank("pp") if seeded == "apart" else 0)
            module = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh=there["fsdp"])
            module(random(2, 4, seed=rank)).square().sum().backward()
            before = [one.grad.full_tensor().clone() for one in module.parameters()]
            said = told(lambda: Clipper(module, NormClip(max_norm=0.1)).step())
            after = [one.grad.full_tensor() for one in module.parameters()]
            return said, all(map(torch.equal, before, after))

        answers = workers.run(work, world=4)
        assert answers == [answers[0]] * 4
        assert answers[0][0].startswith("the gradients of '0.weight', '0.bias', '1.weight' and 1 more differ between")
        assert "process_group=mesh['pp']" in answers[0][0]
        assert answers[0][1]

    def test_each_sharded_on_ranks_of_its_own_are_said(self) -> None:
        def work(rank: int) -> Any:
            mesh(4)
            own = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][rank // 2]
            said = []
            for seed in (rank // 2, 0):
                # Of copies that somebody averages there is nothing to say.
                clipper = Clipper([("w", parameter(random(4, 3), random(4, 3, seed=seed), own, ROWS))], NormClip())
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    norms = [clipper.step().norm.item() for _ in range(2)]
                said.append([str(one.message) for one in caught])
                dist.barrier()
            return said, norms

        answers = workers.run(work, world=4)
        (message,) = [one for (first, _), _ in answers for one in first]
        assert message.startswith(f"ranks clip by norms of their own, {random(4, 3).norm():.4g} on rank 0 and ")
        assert "process_group=mesh['pp']" in message
        assert [second for (_, second), _ in answers] == [[]] * 4

    def test_other_names_or_shapes_are_refused_with_the_same_sentence(self) -> None:
        def work(rank: int) -> list[str]:
            there = mesh(2)
            weight = parameter(random(4, 2), random(4, 2), there, ROWS)
            names = [("weight", weight), (f"of rank {rank}", parameter(random(2), random(2)))]
            shapes = [("weight", weight), ("bias", parameter(random(2 + rank), random(2 + rank)))]
            return [told(lambda given=given: Clipper(given, NormClip())) for given in (names, shapes)]

        first, second = workers.run(work)
        assert first == second
        assert all("other names or shapes" in said and "process_group=mesh['pp']" in said for said in first)

    @pytest.mark.parametrize("names", ["equal", "different"])
    def test_plain_ones_are_said_once(self, names: str) -> None:
        def work(rank: int) -> Any:
            mesh(2)
            said = []
            for _ in range(2):
                pairs = [(f"{rank if names == 'different' else 0}.weight", parameter(random(3), random(3, seed=rank)))]
                clipper = Clipper(pairs, NormClip(max_norm=0.1))
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    counts = [communicated(clipper)[1] for _ in range(3)]
                # Both are there before the next one.
                dist.barrier()
                said.append([str(one.message) for one in caught])
            return said, counts

        (first, counts), (second, _) = workers.run(work)
        assert counts == [{}] * 3
        for one, other in zip(first, second, strict=True):
            (message,) = one + other
            norms = (random(3, seed=rank).norm().item() for rank in (0, 1))
            assert "norms of their own, {:.4g} on rank 0 and {:.4g} on rank 1".format(*norms) in message
            assert "process_group=mesh['pp']" in message
            assert "DistributedDataParallel" in message


def test_copies_that_are_averaged_are_not_mentioned() -> None:
    """Warnings are errors here: DDP, averages by hand, the first step without or with bad gradients."""

    def work(rank: int) -> list[float]:
        mesh(2)
        wrapped = DistributedDataParallel(layouts.net())
        clippers = [Clipper(given, NormClip()) for given in (wrapped, wrapped.module)]
        norms = []
        for step in range(3):
            wrapped.zero_grad(set_to_none=True)
            if step > 1 or (step == 1 and rank == 1):
                # The other rank comes later.
                wrapped.zero_grad()
            if step > 1:
                wrapped(random(4, 6, seed=rank)).square().sum().backward()
            norms += [clipper.step().norm.item() for clipper in clippers]
        return norms

    first, second = workers.run(work)
    assert first == second
    assert first[-1] > 0


class TestSettings:
    WAYS = (
        ("max_norm", NormClip(max_norm=1.0), NormClip(max_norm=2.0), {}, {}),
        ("norm_type", NormClip(), NormClip(norm_type=float("inf")), {}, {}),
        ("per", NormClip(), NormClip(per="parameter"), {}, {}),
        ("method", NormClip(), AGC(), {}, {}),
        ("method", ValueClip(), None, {}, {}),
        ("window", QuantileClip(), QuantileClip(window=5), {}, {}),
        ("action", NormClip(), NormClip(), {}, {"action": "observe"}),
        ("nonfinite", NormClip(), NormClip(), {"nonfinite": "raise"}, {}),
        ("max_consecutive_skips", NormClip(), NormClip(), {}, {"max_consecutive_skips": None}),
        ("measure_per", NormClip(), NormClip(), {"measure_per": "layer"}, {}),
        ("include", NormClip(), NormClip(), {}, {"include": "a*"}),
        ("process_group", NormClip(), NormClip(), {}, {"process_group": True}),
    )

    def test_ranks_that_disagree_are_all_told_about_what(self) -> None:
        def work(rank: int) -> list[str]:
            there = mesh(2)
            said = []
            for _, method, other, options, others in self.WAYS:
                pairs = [("a", parameter(random(4), random(4), there, ROWS)), ("b", parameter(random(2), random(2)))]
                given = dict(others if rank else options)
                if "process_group" in given:
                    given["process_group"] = dist.group.WORLD
                said.append(told(lambda: Clipper(pairs, other if rank else method, **given)))  # noqa: B023
            return said

        first, second = workers.run(work)
        assert first == second
        for (name, *_), said in zip(self.WAYS, first, strict=True):
            assert said.startswith(f"ranks clip by different settings, {name}: ")
            assert "on rank 0" in said
            assert "on rank 1" in said
        assert "max_norm: 1.0 on rank 0, 2.0 on rank 1" in first[0]

    def test_ranks_that_exchange_nothing_are_all_told(self) -> None:
        """In the first step, without a collective; and later where one of them is late."""

        def work(rank: int, late: bool) -> Any:
            mesh(2)
            clipper = Clipper([("a", parameter(random(3), random(3)))], NormClip(max_norm=1.0 + rank))
            said: list[list[str]] = []
            counts = []
            for step in range(3):
                if late and rank == 1 and step == 0:
                    dist.barrier()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    counts.append(communicated(clipper)[1])
                said.append([str(one.message) for one in caught])
                if late and rank == 0 and step == 0:
                    dist.barrier()
                    dist.barrier()
                elif late and rank == 1 and step == 0:
                    dist.barrier()
            return said, counts

        for late in (False, True):
            answers = workers.run(work, late)
            told = [[len(one) for one in said] for said, _ in answers]
            assert told == [[0, 1, 0] if late else [1, 0, 0], [1, 0, 0]]
            messages = {one for said, _ in answers for of_step in said for one in of_step}
            assert len(messages) == 1
            assert messages.pop().startswith("ranks clip by different settings, max_norm: 1.0 on rank 0, 2.0 on rank 1")
            assert [counts for _, counts in answers] == [[{}] * 3] * 2


class TestPartOfTheRun:
    def test_what_is_cut_on_fewer_ranks_than_what_is_whole(self) -> None:
        """A mesh that knows all ranks makes it right; where nothing does, the ranks that stand aside are told."""
        weights = {"w": random(4, 3), "c": random(3, seed=1)}
        given = {"w": random(4, 3, seed=2), "c": random(3, seed=3)}

        def work(rank: int) -> Any:
            everyone, first = mesh(4), DeviceMesh("cpu", [0, 1])
            found = []
            for method in (NormClip(max_norm=0.1), AGC(clip_factor=1e-3), Normalize(per="parameter")):
                pairs = [
                    ("w", parameter(weights["w"], given["w"], first, ROWS)),
                    ("c", parameter(weights["c"], given["c"], everyone, WHOLE)),
                ]
                Clipper(pairs, method).step()
                found.append([whole(pairs[1][1].grad), whole(pairs[0][1].grad) if rank < 2 else None])
            pairs[1] = ("c", parameter(weights["c"], given["c"]))
            said = told(lambda: Clipper(pairs, NormClip(max_norm=0.1)).step())
            named = Clipper(pairs, NormClip(max_norm=0.1), process_group=everyone).step().norm.item()
            return found, said, named

        answers = workers.run(work, world=4)
        for i, method in enumerate((NormClip(max_norm=0.1), AGC(clip_factor=1e-3), Normalize(per="parameter"))):
            dense = plain(given, weights)
            Clipper(dense, method).step()
            for rank, (found, *_) in enumerate(answers):
                torch.testing.assert_close(found[i][0], dense[1][1].grad, rtol=1e-6, atol=0.0)
                if rank < 2:
                    torch.testing.assert_close(found[i][1], dense[0][1].grad, rtol=1e-6, atol=0.0)
        for _, said, norm in answers:
            assert norm == pytest.approx(torch.cat([*map(torch.flatten, (dense[0][1].grad, given["c"]))]).norm().item())
            assert said.startswith(
                "parameter 'c' is whole on ranks 2, 3, and others beside it are cut among ranks 0, 1"
            )
            assert said == answers[0][1]

    def test_groups_are_made_once_and_end_with_the_run(self) -> None:
        def work(rank: int) -> Any:
            there, found = mesh(3), []
            if rank < 2:
                halves = DeviceMesh("cpu", [0, 1], _init_backend=False)
                pairs = [(name, parameter(random(4, 2), random(4, 2), halves, ROWS)) for name in "ab"]
                before = groups()
                clippers = []
                for _ in range(3):
                    optimizer = SGD([pairs[0][1]], lr=0.1)
                    clippers.append(Clipper(pairs, NormClip(max_norm=0.1), optimizer=optimizer))
                    clippers[-1].step()
                    optimizer.add_param_group({"params": [pairs[1][1]]})
                    clippers[-1].step()
                found = [groups() - before]
                # A mesh has groups already.
                pairs = [("a", parameter(random(4, 2), random(4, 2), there, ROWS))]
                before = groups()
                found.append(groups() - before)
            dist.barrier()
            dist.destroy_process_group()
            return found, groups()

        for rank, (made, left) in enumerate(workers.run_fresh(work, world=3)):
            assert left == 0
            assert rank == 2 or made == [1, 0]


class TestIgnored:
    def test_by_fsdp(self) -> None:
        def work(rank: int, alike: bool) -> Any:
            mesh(2)
            module = layouts.net()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = FullyShardedDataParallel(
                    module,
                    use_orig_params=True,
                    device_id=torch.device("cpu"),
                    ignored_states=[module.head.weight],
                )
                wrapped(random(4, 6, seed=0 if alike else rank)).square().sum().backward()
            try:
                return Clipper(wrapped, NormClip(max_norm=0.1)).step().norm.item()
            except RuntimeError as error:
                return str(error)

        first, second = workers.run(work, True)
        module = layouts.net()
        module(random(4, 6)).square().sum().backward()
        assert first == second == pytest.approx(Clipper(module, NormClip()).step().norm.item(), rel=1e-6)
        first, second = workers.run(work, False)
        assert first == second
        assert first.startswith("the gradients of 'head.weight' differ between ranks 0, 1")
        assert "exclude=" in first

    def test_a_copy_that_only_one_rank_has_a_gradient_of(self) -> None:
        def work(rank: int) -> str:
            there = mesh(2)
            pairs = [
                ("cut", parameter(random(4, 2), random(4, 2), there, COLUMNS)),
                ("whole", parameter(random(2), None if rank else random(2))),
            ]
            return told(Clipper(pairs, NormClip()).step)

        first, second = workers.run(work)
        assert first == second
        assert "'whole' differ between ranks 0, 1" in first
