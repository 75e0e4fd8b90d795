"""Which parameters are served, what they are called, and which scope each belongs to."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from kit.gradients import SCOPES, named, normal, two_groups
from lightning_gradclip.select.parameters import Names
from lightning_gradclip.select.scopes import Scopes

CPU = torch.device("cpu")


def zeros(*names: str) -> list[tuple[str, Parameter]]:
    return [(name, Parameter(torch.zeros(2))) for name in names]


class TestPatterns:
    @pytest.mark.parametrize(
        ("include", "exclude", "selected"),
        [
            (("*",), (), ["a.weight", "a.bias", "b.0.weight", "b.0.bias", "c"]),
            (("a.*",), (), ["a.weight", "a.bias"]),
            (("*.weight",), (), ["a.weight", "b.0.weight"]),
            (("c", "a.*"), (), ["a.weight", "a.bias", "c"]),
            (("*",), ("*.bias",), ["a.weight", "b.0.weight", "c"]),
            (("a.*", "b.*"), ("*.bias", "b.*"), ["a.weight"]),
            (("b.?.[vw]eight",), (), ["b.0.weight"]),
        ],
    )
    def test_include_admits_and_exclude_takes_out(
        self, include: tuple[str, ...], exclude: tuple[str, ...], selected: list[str]
    ) -> None:
        names = Names(zeros("a.weight", "a.bias", "b.0.weight", "b.0.bias", "c"), include, exclude)
        assert list(names.select(None).names) == selected

    def test_a_pattern_is_about_the_whole_name_and_its_case(self) -> None:
        for pattern in ("a", "A.*", "eight"):
            with pytest.raises(ValueError, match="matches no parameter"):
                Names(zeros("a.weight"), (pattern,))

    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_an_unmatched_pattern_is_answered_with_the_closest_names(self, option: str) -> None:
        pairs = zeros("encoder.weight", "encoder.bias", "decoder.weight", "zzz")
        with pytest.raises(ValueError, match="matches no parameter") as failure:
            Names(pairs, **{option: ("encodr.*",)})
        message = str(failure.value)
        assert message.startswith(f"{option}='encodr.*' matches no parameter; the closest names are: encoder.")
        assert "encoder.weight" in message
        assert "encoder.bias" in message
        assert "zzz" not in message
        assert message.endswith("such as 'encoder.*'")

    def test_one_of_several_patterns_is_checked_too(self) -> None:
        with pytest.raises(ValueError, match=r"^include='b\.\*' matches no parameter"):
            Names(zeros("a.weight"), ("a.*", "b.*"))

    def test_a_pattern_unlike_every_name_shows_some(self) -> None:
        with pytest.raises(ValueError, match=r"closest names are: encoder\.weight, head\.bias\."):
            Names(zeros("encoder.weight", "head.bias"), ("99",))

    def test_without_parameters_there_is_nothing_to_match(self) -> None:
        assert Names([]).select(None).params == ()
        with pytest.raises(ValueError, match="there are no named parameters"):
            Names([], ("a.*",))

    def test_patterns_are_about_the_module_not_about_one_optimizer(self) -> None:
        generator, discriminator = zeros("generator.weight"), zeros("discriminator.weight")
        names = Names([*generator, *discriminator], ("generator.*",))
        assert names.select(torch.optim.SGD([discriminator[0][1]], lr=0.1)).names == ()
        assert names.select(torch.optim.SGD([generator[0][1]], lr=0.1)).names == ("generator.weight",)


class TestNames:
    def test_the_order_is_the_optimizers_and_everything_owned_is_known(self) -> None:
        pairs = zeros("a", "b", "c", "d")
        of = dict(pairs)
        optimizer = torch.optim.SGD([{"params": [of["c"], of["a"]]}, {"params": [of["b"]]}], lr=0.1)
        selection = Names(pairs, exclude=("a",)).select(optimizer)
        assert selection.names == ("c", "b")
        assert all(one is other for one, other in zip(selection.params, (of["c"], of["b"]), strict=True))
        assert [id(one) for one in selection.owned] == [id(of[name]) for name in ("c", "a", "b")]
        assert selection.groups == ("group0", "group1")

    def test_tied_parameters_count_once_under_their_first_name(self) -> None:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        model = nn.Sequential(first, second)
        every = list(model.named_parameters(remove_duplicate=False))
        assert [name for name, _ in every].count("1.weight") == 1
        assert Names(every).select(None).names == ("0.weight", "0.bias", "1.bias")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert Names(every).select(optimizer).names == ("0.weight", "0.bias", "1.bias")

    def test_parameters_outside_the_module_are_called_by_their_place(self) -> None:
        pairs = zeros("a")
        outside = [Parameter(torch.zeros(1)) for _ in range(3)]
        optimizer = torch.optim.SGD([{"params": [pairs[0][1], outside[0]]}, {"params": outside[1:]}], lr=0.1)
        assert Names(pairs).select(optimizer).names == ("a", "group0.1", "group1.0", "group1.1")
        with pytest.raises(ValueError, match=r"not named: group0\.1 of shape \(1,\), .*; name them too"):
            Names(pairs, exclude=("a",)).select(optimizer)

    @pytest.mark.parametrize("pattern", ["a.*", "_orig_mod.a.*"])
    def test_patterns_match_the_clean_name_and_the_raw_one(self, pattern: str) -> None:
        assert Names(zeros("_orig_mod.a.weight", "_orig_mod.b"), (pattern,)).select(None).names == ("a.weight",)

    @pytest.mark.parametrize(
        ("given", "groups"),
        [
            (("body", "head"), ("body", "head")),
            (("x", "x"), ("group0", "group1")),
            ((None, "head"), ("group0", "head")),
        ],
    )
    def test_groups_keep_names_that_tell_them_apart(
        self, given: tuple[str | None, str], groups: tuple[str, str]
    ) -> None:
        pairs = zeros("a", "b")
        options = [
            {"params": [parameter]} if name is None else {"params": [parameter], "name": name}
            for name, (_, parameter) in zip(given, pairs, strict=True)
        ]
        # torch refuses to name only some groups when they are given, not when one is added later.
        optimizer = torch.optim.SGD(options[:1], lr=0.1)
        optimizer.param_groups.append({**optimizer.param_groups[0], "name": given[1], **options[1]})
        assert Names(pairs).select(optimizer).groups == groups


class TestScopes:
    @pytest.mark.parametrize("per", ["model", "group", "layer", "parameter"])
    def test_every_parameter_belongs_to_one_scope(self, per: str) -> None:
        pairs = named(normal(0))
        selection = Names(pairs).select(two_groups(pairs))
        scopes = selection.scopes(per)
        assert {name: scopes.names[i] for name, i in zip(selection.names, scopes.index, strict=True)} == SCOPES[per]

    @pytest.mark.parametrize(("per", "names"), [("model", ("model",)), ("group", ()), ("layer", ()), ("parameter", ())])
    def test_without_parameters_only_the_model_remains(self, per: str, names: tuple[str, ...]) -> None:
        assert Names([]).select(None).scopes(per) == Scopes(names, ())

    def test_a_layer_is_the_module_that_owns_the_parameter(self) -> None:
        pairs = zeros("a.b.0.weight", "a.b.0.bias", "a.b.1.weight", "a.w", "w")
        assert Names(pairs).select(None).scopes("layer") == Scopes(("a.b.0", "a.b.1", "a", "root"), (0, 0, 1, 2, 3))

    def test_scopes_are_in_order_of_first_appearance(self) -> None:
        scopes = Scopes.of(["b", "a", "b", "c", "a"])
        assert scopes == Scopes(("b", "a", "c"), (0, 1, 0, 2, 1))

    def test_the_index_is_moved_to_a_device_once(self) -> None:
        scopes = Scopes.of(["b", "a", "b"])
        assert scopes.index_on(CPU).tolist() == [0, 1, 0]
        assert scopes.index_on(CPU) is scopes.index_on(CPU)
