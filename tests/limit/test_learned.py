"""Learned values across runs: rows named by their scope, and a fingerprint of what they mean."""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.gradients import SHAPES, named, normal, same_bits, two_groups
from kit.running_max import RunningMax
from lightning_gradclip import ClipMethod, Clipper, NormClip
from lightning_gradclip.limit import learned


def sizes(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def taught(names: list[str], largest: list[float], per: str = "parameter") -> RunningMax:
    """A method that has learned `largest` for these scopes."""
    method = RunningMax(per=per)
    learned.arrange(method, (), names, sizes(len(names)))
    size = torch.tensor(largest, dtype=torch.float64)
    method.update(size, size, size > 0)
    return method


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestFingerprint:
    def test_it_is_what_the_values_depend_on(self) -> None:
        assert learned.fingerprint(RunningMax(per="layer", norm_type=1.0, ratio=3.0)) == {
            "class": "RunningMax",
            "per": "layer",
            "norm_type": 1.0,
            "statistic": "norm",
        }

    def test_a_window_belongs_to_it(self) -> None:
        @dataclass(kw_only=True)
        class Windowed(RunningMax):
            window: int = 7

        assert learned.fingerprint(Windowed())["window"] == 7

    @pytest.mark.parametrize(
        ("method", "said"),
        [
            (RunningMax(per="layer"), "RunningMax(per='layer', norm_type=2.0, statistic='norm')"),
            (RunningMax(norm_type=1.0), "RunningMax(per='model', norm_type=1.0, statistic='norm')"),
            (NormClip(), "NormClip(per='model', norm_type=2.0, statistic='norm')"),
        ],
    )
    def test_another_meaning_is_refused_and_both_are_named(self, method: ClipMethod, said: str) -> None:
        saved = learned.save(taught(["model"], [1.0], per="model"), ["model"])
        with pytest.raises(ValueError, match="use the same settings, or relearn=True, which learns afresh") as failure:
            learned.require_same_meaning(method, saved)
        ours = "learned by RunningMax(per='model', norm_type=2.0, statistic='norm'), but this run clips by "
        assert ours + said in str(failure.value)

    def test_another_configuration_of_the_same_meaning_is_welcome(self) -> None:
        saved = learned.save(taught(["model"], [1.0], per="model"), ["model"])
        learned.require_same_meaning(RunningMax(ratio=7.0), saved)

    def test_where_nothing_was_learned_nothing_is_refused(self) -> None:
        saved = learned.save(NormClip(), ["model"])
        assert saved["values"] == {}
        learned.require_same_meaning(RunningMax(per="layer"), saved)


class TestArrange:
    def test_rows_start_fresh(self) -> None:
        method = taught(["a", "b"], [0.0, 0.0])
        assert method.state["largest"].tolist() == [0, 0]
        assert method.state["recent"].tolist() == [[0, 0], [0, 0]]

    def test_what_an_earlier_run_left_in_the_method_is_not_taken_over(self) -> None:
        method = taught(["a", "b"], [1.0, 2.0])
        learned.arrange(method, (), ["a", "b"], sizes(2))
        assert method.state["largest"].tolist() == [0, 0]

    def test_the_same_scopes_keep_their_rows(self) -> None:
        method = taught(["a", "b"], [1.0, 2.0])
        learned.arrange(method, ["a", "b"], ["a", "b"], sizes(2))
        assert method.state["largest"].tolist() == [1, 2]

    def test_rows_follow_their_names(self) -> None:
        method = taught(["a", "b", "c"], [1.0, 2.0, 3.0])
        learned.arrange(method, ["a", "b", "c"], ["c", "a", "b"], sizes(3))
        assert method.state["largest"].tolist() == [3, 1, 2]
        assert method.state["recent"].tolist() == [[0, 3], [0, 1], [0, 2]]

    def test_new_scopes_start_fresh_among_known_ones(self) -> None:
        method = taught(["a", "b"], [1.0, 2.0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learned.arrange(method, ["a", "b"], ["x", "b", "y", "a"], sizes(4))
        assert method.state["largest"].tolist() == [0, 2, 0, 1]
        assert method.state["recent"].tolist() == [[0, 0], [0, 2], [0, 0], [0, 1]]

    def test_lost_scopes_are_dropped_with_one_warning(self) -> None:
        method = taught(list("abcdef"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        with pytest.warns(RuntimeWarning) as record:
            learned.arrange(method, list("abcdef"), ["f", "new"], sizes(2))
        messages = [str(one.message) for one in record]
        assert messages == ["dropped the learned clipping state of a, b, c and 2 more: not in this run"]
        assert method.state["largest"].tolist() == [6, 0]

    def test_no_scope_in_common_is_an_error_that_shows_both_sides(self) -> None:
        method = taught(["a", "b"], [1.0, 2.0])
        with pytest.raises(ValueError, match="none of which is in this run") as failure:
            learned.arrange(method, ["a", "b"], ["x", "y", "z", "w"], sizes(4))
        message = str(failure.value)
        assert "is about a, b, none" in message
        assert "(x, y, z and 1 more)" in message
        assert message.endswith(
            "resume with the same model, or use relearn=True, which learns afresh and goes on with all else"
        )

    def test_a_method_without_memory_has_nothing_to_arrange(self) -> None:
        method = NormClip(per="parameter")
        learned.arrange(method, ["a"], ["x"], sizes(1))
        assert method.state_dict() == {}


class TestSave:
    def test_it_is_plain_named_and_independent_of_the_method(self) -> None:
        method = taught(["a", "b"], [1.0, 2.0])
        saved = learned.save(method, ("a", "b"))
        assert saved["scopes"] == ["a", "b"]
        loaded = saved_and_loaded(saved)
        assert loaded["fingerprint"] == saved["fingerprint"]
        method.state["largest"][0] = 99.0
        for one in (saved, loaded):
            assert one["values"]["largest"].tolist() == [1, 2]
            assert one["values"]["recent"].tolist() == [[0, 1], [0, 2]]


def stepped(clipper: Clipper, pairs: list[tuple[str, nn.Parameter]], *seeds: int) -> list[dict[str, Tensor]]:
    """Take one step for each seed; the gradients after each."""
    result = []
    for seed in seeds:
        gradients = normal(seed)
        for name, parameter in pairs:
            parameter.grad = gradients[name] if name in gradients else torch.full_like(parameter, 1.0 + seed)
        clipper.step()
        result.append({name: parameter.grad.clone() for name, parameter in pairs})
    return result


def largest(clipper: Clipper) -> dict[str, float]:
    state = clipper.state_dict()["learned"]
    return dict(zip(state["scopes"], state["values"]["largest"].tolist(), strict=True))


class TestThroughTheClipper:
    @pytest.mark.parametrize("per", RunningMax.scopes)
    @pytest.mark.parametrize("cut", [0, 1, 4])
    def test_resuming_is_bit_equal_to_going_on(self, per: str, cut: int) -> None:
        pairs = named(normal(0))
        optimizer = two_groups(pairs)

        def fresh() -> Clipper:
            return Clipper(pairs, RunningMax(per=per, ratio=0.7), optimizer=optimizer)

        straight = fresh()
        stepped(straight, pairs, *range(cut))
        state = saved_and_loaded(straight.state_dict())
        resumed = fresh()
        resumed.load_state_dict(state)
        one, other = (stepped(clipper, pairs, *range(cut, cut + 4)) for clipper in (straight, resumed))
        for a, b in zip(one, other, strict=True):
            assert all(same_bits(a[name], b[name]) for name in SHAPES)
        assert largest(straight) == largest(resumed)
        assert straight.metrics() == resumed.metrics()

    def test_rows_find_their_scopes_in_another_order(self) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, RunningMax(per="parameter"))
        stepped(clipper, pairs, 0, 1)
        turned = pairs[::-1]
        resumed = Clipper(turned, RunningMax(per="parameter"))
        resumed.load_state_dict(clipper.state_dict())
        before = largest(clipper)
        for _, parameter in turned:
            parameter.grad = torch.zeros_like(parameter)
        resumed.step()
        assert largest(resumed) == before
        assert list(largest(resumed)) == [name for name, _ in turned]

    def test_a_group_that_joins_starts_fresh_and_the_others_go_on(self) -> None:
        pairs = named(normal(0))
        late = nn.Parameter(torch.zeros(3))
        optimizer = two_groups(pairs)
        clipper = Clipper([*pairs, ("late.weight", late)], RunningMax(per="parameter"), optimizer=optimizer)
        stepped(clipper, pairs, 0, 1)
        before = largest(clipper)
        optimizer.add_param_group({"params": [late]})
        for _, parameter in pairs:
            parameter.grad = torch.zeros_like(parameter)
        late.grad = torch.tensor([3.0, 0.0, 4.0])
        stats = clipper.step()
        assert largest(clipper) == {**before, "late.weight": 5.0}
        assert stats.scopes == tuple(largest(clipper))
        assert stats.limits[-1] == torch.inf

    def test_a_scope_that_is_gone_is_dropped_with_one_warning(self) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, RunningMax(per="layer"))
        stepped(clipper, pairs, 0, 1)
        kept = [(name, parameter) for name, parameter in pairs if not name.startswith("encoder")]
        resumed = Clipper(kept, RunningMax(per="layer"))
        resumed.load_state_dict(clipper.state_dict())
        with pytest.warns(RuntimeWarning) as record:
            stepped(resumed, kept, 0)
        assert [str(one.message) for one in record] == [
            "dropped the learned clipping state of encoder: not in this run"
        ]
        stepped(resumed, kept, 1)
        assert largest(resumed) == {name: size for name, size in largest(clipper).items() if name != "encoder"}

    def test_another_model_is_an_error_at_the_first_step(self) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, RunningMax(per="layer"))
        stepped(clipper, pairs, 0)
        other = named({"decoder.weight": torch.ones(2)})
        resumed = Clipper(other, RunningMax(per="layer"))
        resumed.load_state_dict(clipper.state_dict())
        with pytest.raises(ValueError, match=r"is about encoder, head, root, none .* \(decoder\)"):
            resumed.step()

    def test_another_fingerprint_is_refused_and_leaves_the_clipper_as_it_is(self) -> None:
        pairs = named(normal(0))
        clipper, other = (Clipper(pairs, RunningMax(per=per)) for per in ("layer", "parameter"))
        stepped(clipper, pairs, 0)
        stepped(other, pairs, 1, 2)
        before = largest(other)
        with pytest.raises(ValueError, match=r"per='layer'.*per='parameter'"):
            other.load_state_dict(clipper.state_dict())
        assert largest(other) == before
        assert other.state_dict()["step"] == 2

    def test_configuration_is_never_restored(self) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, RunningMax(ratio=0.5))
        stepped(clipper, pairs, 0)
        resumed = Clipper(pairs, RunningMax(ratio=0.25))
        resumed.load_state_dict(clipper.state_dict())
        pairs[0][1].grad = torch.ones(5, 3)
        assert resumed.step().limit.item() == 0.25 * largest(clipper)["model"]

    def test_what_was_loaded_does_not_change_with_the_clipper(self) -> None:
        pairs = named(normal(0))
        clipper = Clipper(pairs, RunningMax(per="parameter"))
        stepped(clipper, pairs, 0)
        state = clipper.state_dict()["learned"]
        copy = saved_and_loaded(state)
        resumed = Clipper(pairs, RunningMax(per="parameter"))
        resumed.load_state_dict({**clipper.state_dict(), "learned": state})
        stepped(resumed, pairs, 1, 2, 3)
        for name, value in copy["values"].items():
            assert torch.equal(state["values"][name], value)

    def test_a_method_given_to_two_clippers_learns_in_neither_for_the_other(self) -> None:
        method = RunningMax()
        one, other = ({"w": torch.tensor([3.0])}, {"w": torch.tensor([5.0])})
        clippers = [Clipper(named(gradients), method) for gradients in (one, other)]
        for clipper in clippers:
            clipper.step()
        assert [largest(clipper)["model"] for clipper in clippers] == [3.0, 5.0]
        assert method.state_dict() == {}
