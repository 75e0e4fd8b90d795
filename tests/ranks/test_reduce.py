"""Ranks that hold pieces: what they tell each other, how often, and what each of them then does."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from kit import reference, workers
from kit.pieces import COLUMNS, ROWS, WHOLE, communicated, cut, digest, held, mesh, parameter, plain, random, whole
from kit.sharded import shown
from lightning_gradclip import AGC, ClipMethod, Clipper, EmaClip, NormClip, QuantileClip, ValueClip

pytestmark = pytest.mark.distributed

WEIGHTS = {
    "body.weight": random(5, 4, seed=1),
    "body.bias": random(5, seed=2),
    "norm.weight": random(4, seed=3),
    "head.weight": random(4, 6, seed=4),
    "scale": random(seed=5),
}
GRADIENTS = {name: random(*one.shape, seed=10 + i) for i, (name, one) in enumerate(WEIGHTS.items())}


def spread(gradients: Any = None, weights: Any = None, world: int = 2) -> Any:
    """Rows cut, a bias shorter than some piece, a plain normalization, columns cut, a number that is whole."""
    gradients, weights = gradients or GRADIENTS, weights or WEIGHTS
    there = mesh(world)
    ways = {"body.weight": ROWS, "body.bias": ROWS, "norm.weight": None, "head.weight": COLUMNS, "scale": WHOLE}
    return [
        (name, parameter(weights[name], gradients[name], *(() if way is None else (there, way))))
        for name, way in ways.items()
    ]


def left(pairs: Any) -> dict[str, Tensor | None]:
    return {name: whole(one.grad) for name, one in pairs}


def assert_equal(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], rtol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        assert (one is None) == (ours[name] is None), name
        if one is not None:
            torch.testing.assert_close(ours[name], one, rtol=rtol, atol=0.0, equal_nan=True)


METHODS = {
    "norm": NormClip(),
    "norm per parameter": NormClip(per="parameter"),
    "norm of p 1": NormClip(norm_type=1.0),
    "norm of p 3": NormClip(norm_type=3.0, per="layer"),
    "largest": NormClip(norm_type=math.inf),
    "value": ValueClip(max_value=0.1),
    "agc": AGC(),
    "agc per parameter": AGC(per="parameter"),
    "quantile": QuantileClip(per="parameter"),
}


class TestCollectives:
    def test_one_for_any_mix_of_norms(self) -> None:
        def work(rank: int) -> dict[str, dict[str, int]]:
            found = {}
            for label, method in {**METHODS, "power 8": NormClip(norm_type=8.0)}.items():
                clipper = Clipper(spread(), method, measure_per="layer")
                found[label] = [communicated(clipper)[1] for _ in range(4)]
            return found

        for counts in workers.run(work):
            first, *others = counts.pop("power 8")
            assert (first, others) == ({"c10d.allgather_": 2}, [{"c10d.allgather_": 1}] * 3)
            # In the first step the ranks see that the normalization, which none of them shares, is the same on all.
            alike = [{"c10d.allreduce_": 1, "c10d.allgather_": 1}, *[{"c10d.allreduce_": 1}] * 3]
            assert counts == dict.fromkeys(METHODS, alike)

    def test_one_more_for_each_gradient_that_is_still_to_be_added_up(self) -> None:
        def work(rank: int) -> Any:
            pairs = spread()
            there = mesh(2)
            for name in ("scale", "norm.weight"):
                one = dict(pairs)[name]
                if name == "norm.weight":
                    pairs[2] = (name, one := parameter(WEIGHTS[name], None, there, WHOLE))
                half = GRADIENTS[name] * (0.25 if rank else 0.75)
                one.grad = DTensor.from_local(half, there, [Partial()], run_check=False)
            clipper = Clipper(pairs, NormClip(max_norm=1.0))
            first = communicated(clipper)[1]
            # Now they are.
            return first, communicated(clipper)[1], left(pairs)

        dense = plain(GRADIENTS, WEIGHTS)
        clipper = Clipper(dense, NormClip(max_norm=1.0))
        clipper.step()
        clipper.step()
        for first, second, gradients in workers.run(work):
            assert first == {"c10d.allreduce_": 1, "c10d_functional.all_reduce": 2}
            assert second == {"c10d.allreduce_": 1}
            assert_equal(gradients, left(dense))

    def test_none_where_every_rank_holds_everything(self) -> None:
        def work(rank: int) -> list[dict[str, int]]:
            there = mesh(2)
            pairs = [
                ("plain", parameter(random(3), random(3))),
                ("copied", parameter(random(3), random(3), there, WHOLE)),
                ("alone", parameter(random(4, 2), random(4, 2), DeviceMesh("cpu", [rank]), ROWS)),
            ]
            clipper = Clipper(pairs, NormClip(max_norm=0.1), measure_per="parameter")
            return [communicated(clipper)[1] for _ in range(2)]

        assert workers.run(work) == [[{}, {}]] * 2

    def test_none_in_a_world_of_one(self) -> None:
        def work(rank: int) -> Any:
            pairs = spread(world=1)
            stats, counts = communicated(Clipper(pairs, NormClip(max_norm=0.1)))
            return stats.norm.item(), counts, left(pairs)

        [(norm, counts, gradients)] = workers.run(work, world=1)
        dense = plain(GRADIENTS, WEIGHTS)
        assert Clipper(dense, NormClip(max_norm=0.1)).step().norm.item() == pytest.approx(norm, rel=1e-12)
        assert counts == {}
        assert_equal(gradients, left(dense))

    def test_a_repeated_measurement_and_the_search_for_a_name_are_one_more_each(self) -> None:
        bad = GRADIENTS | {"head.weight": GRADIENTS["head.weight"].clone()}
        bad["head.weight"][3, 5] = math.nan

        def work(rank: int) -> Any:
            zeroed = communicated(Clipper(spread(bad), NormClip(), nonfinite="zero"))[1]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pairs = spread(bad)
                clipper = Clipper(pairs, NormClip())
                first = communicated(clipper)[1]
                for (_, one), (_, again) in zip(pairs, spread(bad), strict=True):
                    one.grad = again.grad
                # Nobody asks for the name any more.
                return zeroed, first, communicated(clipper)[1]

        for zeroed, first, second in workers.run(work):
            assert zeroed == first == {"c10d.allreduce_": 2, "c10d.allgather_": 1}
            assert second == {"c10d.allreduce_": 1}


class TestNonfinite:
    """A rank that sees something bad in its piece tells all others."""

    @pytest.mark.parametrize("bad", [math.nan, -math.inf])
    def test_every_rank_does_what_one_process_does(self, bad: float) -> None:
        spoiled = {name: one.clone() for name, one in GRADIENTS.items()}
        # In the piece of the last rank.
        spoiled["body.weight"][4, 3] = bad
        methods = {label: METHODS[label] for label in ("norm", "largest", "norm of p 3", "value", "agc", "quantile")}
        cases = [(label, policy) for label in methods for policy in ("skip", "zero", "raise", "ignore")]

        def steps(pairs: Any, method: ClipMethod, policy: str) -> Any:
            clipper = Clipper(pairs, method, nonfinite=policy, measure_per="layer")
            given = [(one, one.grad) for _, one in pairs]
            said = ""
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    stats = [shown(clipper.step())]
                except FloatingPointError as error:
                    said, stats = str(error), []
            after = left(pairs)
            # Back to something finite: nothing of it is left.
            for one, gradient in given:
                one.grad = torch.ones_like(gradient)
            stats.append(shown(clipper.step()))
            return stats, said or [str(one.message) for one in caught], after, clipper.state_dict(), clipper.metrics()

        def work(rank: int) -> Any:
            return [steps(spread(spoiled), methods[label], policy) for label, policy in cases]

        first, second = workers.run(work)
        for (label, policy), one, other in zip(cases, first, second, strict=True):
            stats, said, after, state, metrics = steps(plain(spoiled, WEIGHTS), methods[label], policy)
            assert digest(one[0], one[2:]) == digest(other[0], other[2:]), (label, policy)
            assert_equal(one[2], after)
            for ours, theirs in zip(one[0], stats, strict=True):
                for name, value in theirs.items():
                    # NaN travels as inf where the largest is wanted.
                    expected = value.nan_to_num(math.inf, math.inf) if label == "largest" else value
                    found = ours[name].nan_to_num(math.inf, math.inf) if label == "largest" else ours[name]
                    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
            assert one[1] == said, (label, policy)
            # Warnings are for the first rank, errors for all.
            assert other[1] == (said if isinstance(said, str) else [])
            assert ("body.weight" in str(said)) == (policy in ("skip", "raise"))
            assert metrics.keys() == one[4].keys()
            assert digest(state["step"], state["skips_in_a_row"]) == digest(one[3]["step"], one[3]["skips_in_a_row"])

    @pytest.mark.parametrize("p", [2.0, 3.0, 8.0, math.inf])
    def test_a_copy_that_went_bad_on_one_rank_only(self, p: float) -> None:
        def work(rank: int) -> Any:
            pairs = spread()
            if rank == 1:
                dict(pairs)["norm.weight"].grad[0] = math.nan
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stats = Clipper(pairs, NormClip(norm_type=p)).step()
            return stats.finite.item(), stats.skipped.item(), [one.grad is None for _, one in pairs]

        assert workers.run(work) == [(False, True, [True] * 5)] * 2

    def test_too_many_drops_end_the_run_on_every_rank(self) -> None:
        spoiled = GRADIENTS | {"head.weight": GRADIENTS["head.weight"] * math.inf}

        def work(rank: int) -> str:
            pairs = spread(spoiled)
            given = [one.grad for _, one in pairs]
            clipper = Clipper(pairs, NormClip(), max_consecutive_skips=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                clipper.step()
            for (_, one), gradient in zip(pairs, given, strict=True):
                one.grad = gradient
            with pytest.raises(FloatingPointError) as error:
                clipper.step()
            return str(error.value)

        first, second = workers.run(work)
        assert first == second
        assert first.startswith("2 optimizer steps in a row were dropped")
        assert "head.weight" in first


class TestAbsent:
    """What a rank has no gradient of."""

    def test_no_gradient_anywhere_is_no_step_on_any_rank(self) -> None:
        def work(rank: int) -> Any:
            found = []
            for method in METHODS.values():
                pairs = spread(dict.fromkeys(GRADIENTS))
                clipper = Clipper(pairs, method, measure_per="parameter")
                stats, counts = communicated(clipper)
                found.append(
                    (counts, clipper.metrics(), clipper.state_dict()["step"], stats.norm.item(), clipper.has_news)
                )
            return found

        for found in workers.run(work):
            counts = {"c10d.allreduce_": 1, "c10d.allgather_": 1}
            assert found == [(counts, {"skipped": 0.0, "nonfinite": 0.0}, 0, 0.0, False)] * len(METHODS)

    def test_none_on_one_rank_is_zeros_there(self) -> None:
        """All of them, so that this rank does not even know in which precision the others measure."""

        def work(rank: int, without: list[str]) -> Any:
            found = {}
            for label, method in METHODS.items():
                pairs = spread()
                # A copy that a mesh keeps: any other has a gradient on all ranks or on none.
                pairs[2] = ("norm.weight", parameter(WEIGHTS["norm.weight"], GRADIENTS["norm.weight"], mesh(2), WHOLE))
                for name in without if rank == 1 else ():
                    dict(pairs)[name].grad = None
                clipper = Clipper(pairs, method, measure_per="parameter")
                stats = [shown(clipper.step())]
                pieces = {name: None if one.grad is None else held(one.grad).clone() for name, one in pairs}
                found[label] = (stats, clipper.metrics(), clipper.state_dict(), pieces)
            return found

        halves = {name: one.clone() for name, one in GRADIENTS.items()}
        halves["body.weight"][3:] = 0.0
        halves["body.bias"][3:] = 0.0
        halves["head.weight"][:, 3:] = 0.0
        for without in (["body.weight", "body.bias", "head.weight"], list(WEIGHTS)):
            if len(without) == len(WEIGHTS):
                # What both ranks hold counts half on each.
                for name in ("norm.weight", "scale"):
                    halves[name] = GRADIENTS[name] * math.sqrt(0.5)
            first, second = workers.run(work, without)
            for label, method in METHODS.items():
                one, other = first[label], second[label]
                assert digest(one[:3]) == digest(other[:3]), label
                if label in ("largest", "norm of p 1", "norm of p 3", "value") and len(without) == len(WEIGHTS):
                    continue
                clipper = Clipper(plain(halves, WEIGHTS), method, measure_per="parameter")
                expected = shown(clipper.step())
                for name, value in expected.items():
                    assert one[0][0][name].dtype == value.dtype, (label, name)
                    torch.testing.assert_close(one[0][0][name], value, rtol=1e-6, atol=1e-9, equal_nan=True)
                assert all(other[3][name] is None for name in without)

    @pytest.mark.parametrize("absent", ["body.weight", "norm.weight", "head.weight"])
    def test_absent_on_every_rank_is_not_zero(self, absent: str) -> None:
        def work(rank: int) -> Any:
            found = []
            for gradients in (GRADIENTS | {absent: None}, GRADIENTS | {absent: torch.zeros_like(WEIGHTS[absent])}):
                clipper = Clipper(spread(gradients), EmaClip(per="parameter", warmup=1), measure_per="parameter")
                clipper.step()
                found.append((clipper.metrics(), clipper.state_dict()["learned"]))
            return found

        first, second = workers.run(work)
        assert digest(first) == digest(second)
        (without, learned), (zero, learned_too) = first
        assert f"norm/{absent}" not in without
        assert zero[f"norm/{absent}"] == 0.0
        place = learned["scopes"].index(absent)
        for values in (learned["values"], learned_too["values"]):
            assert values["count"].tolist() == [int(i != place) for i in range(5)]

    def test_absent_entries_are_in_no_share_and_no_mean(self) -> None:
        without = GRADIENTS | {"body.weight": None, "norm.weight": None}
        methods = (ValueClip(max_value=0.5), NormClip(statistic="rms"), NormClip(statistic="rms", per="layer"))

        def steps(make: Any) -> list[Any]:
            return [shown(Clipper(make(), method).step()) for method in methods]

        first, second = workers.run(lambda rank: steps(lambda: spread(without)))
        assert digest(first) == digest(second)
        expected = steps(lambda: plain(without, WEIGHTS))
        torch.testing.assert_close(first, expected, rtol=1e-6, atol=0.0, equal_nan=True)


class TestBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_all_ranks_know_the_same_to_the_last_bit(self, dtype: torch.dtype) -> None:
        weights = {name: one.to(dtype) for name, one in WEIGHTS.items()}
        seeds = range(6)

        def gradients(seed: int) -> dict[str, Tensor]:
            return {
                name: random(*one.shape, seed=100 * seed + i, dtype=dtype)
                for i, (name, one) in enumerate(WEIGHTS.items())
            }

        def work(rank: int) -> Any:
            found = []
            # Uneven rows, shares of thirds.
            pairs = spread(weights=weights, gradients=gradients(0), world=3)
            clippers = [Clipper(pairs, method) for method in (*METHODS.values(), NormClip(norm_type=8.0, per="layer"))]
            for seed in seeds:
                given = [
                    cut(new, one.grad.device_mesh, *one.grad.placements) if isinstance(one.grad, DTensor) else new
                    for new, (_, one) in zip(gradients(seed).values(), pairs, strict=True)
                ]
                for clipper in clippers:
                    for (_, one), gradient in zip(pairs, given, strict=True):
                        one.grad = gradient.clone()
                    found.append(shown(clipper.step()))
            return digest(found, [clipper.state_dict() for clipper in clippers]), found

        answers = workers.run(work, world=3)
        assert len({bits for bits, _ in answers}) == 1
        found = iter(answers[0][1])
        dense = plain(gradients(0), weights)
        clippers = [Clipper(dense, method) for method in (*METHODS.values(), NormClip(norm_type=8.0, per="layer"))]
        for seed in seeds:
            for clipper in clippers:
                for (_, one), gradient in zip(dense, gradients(seed).values(), strict=True):
                    one.grad = gradient
                torch.testing.assert_close(next(found), shown(clipper.step()), rtol=1e-6, atol=1e-12, equal_nan=True)

    @pytest.mark.parametrize(
        ("dtype", "factor"),
        [(torch.float64, 1e200), (torch.float64, 1e-200), (torch.float32, 1e30), (torch.float32, 1e-30)],
    )
    def test_sizes_at_the_edge_of_the_range(self, dtype: torch.dtype, factor: float) -> None:
        gradients = {name: (one.double() * factor).to(dtype) for name, one in GRADIENTS.items()}
        weights = {name: one.to(dtype) for name, one in WEIGHTS.items()}
        # A limit of 1e-200 is nothing beside what is added to the norm.
        cases = [(p, per, max(factor, 1e-3)) for p in (1.0, 2.0, 3.0, 6.0) for per in ("model", "layer")]

        def work(rank: int) -> Any:
            found = []
            for p, per, limit in cases:
                pairs = spread(gradients, weights)
                stats = Clipper(pairs, NormClip(max_norm=limit, norm_type=p, per=per)).step()
                found.append((stats.norm, stats.sizes, left(pairs)))
            return found

        first, second = workers.run(work)
        assert digest(first) == digest(second)
        arrays = {name: reference.array(one) for name, one in gradients.items()}
        for (p, per, limit), (norm, sizes, after) in zip(cases, first, strict=True):
            scope = {name: per == "layer" and name.rpartition(".")[0] for name in arrays}
            exact, expected, _ = reference.norm_clip(arrays, scope, max_norm=limit, p=p)
            np.testing.assert_allclose(norm, reference.joint_norm(list(arrays.values()), p), rtol=1e-6)
            np.testing.assert_allclose(sizes, list(expected.values()), rtol=1e-6)
            for name, one in after.items():
                np.testing.assert_allclose(reference.array(one), exact[name], rtol=1e-6)

    def test_a_unit_of_extreme_size_on_one_rank_makes_all_measure_alike(self) -> None:
        odd = GRADIENTS | {"body.weight": GRADIENTS["body.weight"].clone()}
        odd["body.weight"][0] *= 1e-30
        odd["body.weight"][4] *= 1e30

        def work(rank: int) -> Any:
            pairs = spread(odd)
            return shown(Clipper(pairs, AGC()).step()), left(pairs)

        first, second = workers.run(work)
        assert digest(first) == digest(second)
        dense = plain(odd, WEIGHTS)
        stats = shown(Clipper(dense, AGC()).step())
        assert stats["sizes"].dtype == torch.float64
        for name in ("sizes", "limits"):
            torch.testing.assert_close(first[0][name], stats[name], rtol=1e-6, atol=0.0)
        assert_equal(first[1], left(dense))

    def test_agc_equals_one_process_to_the_bit_where_rows_are_whole(self) -> None:
        names = ("body.weight", "norm.weight")
        weights = {name: WEIGHTS[name] for name in names}
        given = [{name: random(*weights[name].shape, seed=seed) for name in names} for seed in range(5)]

        def steps(make: Any) -> Any:
            found = []
            for gradients in given:
                pairs = [(name, make(name, gradients[name])) for name in names]
                stats = Clipper(pairs, AGC(clip_factor=0.5)).step()
                found.append((stats.sizes, stats.limits, left(pairs)))
            return found

        def work(rank: int) -> bytes:
            there = mesh(2)
            ways = {"body.weight": (there, ROWS), "norm.weight": ()}
            return digest(steps(lambda name, one: parameter(weights[name], one, *ways[name])))

        expected = digest(steps(lambda name, one: parameter(weights[name], one)))
        assert workers.run(work) == [expected, expected]
