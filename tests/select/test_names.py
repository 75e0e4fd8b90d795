"""What parameters are called: clean, under all their names, and by the layer whose they are."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from kit.running_max import RunningMax
from lightning_gradclip import Clipper, NormClip
from lightning_gradclip.select.names import Holder, as_called_now, clean_names
from lightning_gradclip.select.parameters import Names


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (["_orig_mod.a.weight"], ["a.weight"]),
        (["a._orig_mod.weight", "b.weight"], ["a.weight", "b.weight"]),
        (["_fsdp_wrapped_module.a._checkpoint_wrapped_module.w"], ["a.w"]),
        (["_forward_module.module.a", "_forward_module.module.b"], ["a", "b"]),
        (["module.a", "module.b"], ["a", "b"]),
        (["module.module.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["a.module.w", "b"], ["a.module.w", "b"]),
        (["my_orig_mod.w", "_orig_module.w"], ["my_orig_mod.w", "_orig_module.w"]),
        # A module that is used compiled and plain: no two parameters may share a name.
        (["_orig_mod.w", "w"], ["_orig_mod.w", "w"]),
        ([], []),
    ],
)
def test_what_wrappers_insert_is_taken_out(raw: list[str], clean: list[str]) -> None:
    assert clean_names(raw) == clean


class Tied(nn.Module):
    """An embedding whose weight is that of the head too, and a block that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.emb.weight
        self.block = nn.Linear(3, 3)
        self.again = self.block


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class TestTied:
    @pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, Wrapper], ids=["plain", "compiled", "data"])
    @pytest.mark.parametrize(
        ("include", "exclude", "selected"),
        [
            ("*", "head.*", ["block.weight", "block.bias"]),
            ("*", "emb.weight", ["head.bias", "block.weight", "block.bias"]),
            ("head.*", (), ["emb.weight", "head.bias"]),
            ("again.*", (), ["block.weight", "block.bias"]),
            ("*", "again.bias", ["emb.weight", "head.bias", "block.weight"]),
        ],
    )
    def test_patterns_match_under_every_name(
        self, include: str, exclude: str, selected: list[str], wrap: object
    ) -> None:
        model = wrap(Tied())  # type: ignore[operator]
        for given in (model, model.named_parameters()):
            names = Names(given, (include,), (exclude,) if exclude else ())
            assert list(names.select(None).names) == selected

    def test_pairs_may_tell_all_names_too(self) -> None:
        pairs = [*Tied().named_parameters(remove_duplicate=False)]
        assert Names(pairs, exclude=("head.weight",)).select(None).names == ("head.bias", "block.weight", "block.bias")

    def test_its_own_name_is_the_first(self) -> None:
        assert Names(Tied()).select(None).layers == ("emb", "head", "block", "block")


class Scale(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def parametrized(kind: str) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    match kind:
        case "weight_norm":
            parametrizations.weight_norm(net[0])
        case "spectral_norm":
            parametrizations.spectral_norm(net[0])
        case "orthogonal":
            parametrizations.orthogonal(net[0])
        case _:
            parametrize.register_parametrization(net[0], "weight", Scale())
    return net


class TestParametrized:
    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("weight_norm", ["0.bias", "0.weight.original0", "0.weight.original1"]),
            ("spectral_norm", ["0.bias", "0.weight"]),
            ("orthogonal", ["0.bias", "0.weight"]),
            ("own", ["0.bias", "0.weight", "0.weight.0.scale"]),
        ],
    )
    def test_the_layer_stays_one_and_keeps_its_names(self, kind: str, names: list[str]) -> None:
        net = parametrized(kind)
        selection = Names(net).select(None)
        assert list(selection.names) == [*names, "1.weight", "1.bias"]
        assert selection.scopes("layer").names == ("0", "1")
        assert list(Names(net, ("0.weight",)).select(None).names) == names[1:]
        assert list(Names(net, ("*",), ("0.weight", "1.*")).select(None).names) == ["0.bias"]
        assert Names(net, ("0.parametrizations.*",)).select(None).names == tuple(names[1:])

    def test_of_a_module_that_is_the_layer_itself(self) -> None:
        selection = Names(parametrized("weight_norm")[0]).select(None)
        assert selection.names == ("bias", "weight.original0", "weight.original1")
        assert set(selection.layers) == {"root"}

    def test_a_limit_of_the_layer_is_about_all_its_parts(self) -> None:
        net = parametrized("weight_norm")
        net(torch.ones(2, 3)).square().sum().backward()
        stats = Clipper(net, NormClip(max_norm=1e9, per="layer")).step()
        parts = [one.grad.norm() for one in net[0].parameters() if one.grad is not None]
        assert len(parts) == 3
        assert stats.sizes[0].item() == pytest.approx(torch.stack(parts).norm().item(), rel=1e-6)

    def test_what_is_parametrized_later_goes_on(self) -> None:
        net = parametrized("spectral_norm")
        plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        for model in (net, plain):
            model(torch.ones(2, 3)).square().sum().backward()
        before = Clipper(plain, RunningMax(per="layer"))
        before.step()
        after = Clipper(net, RunningMax(per="layer"))
        after.load_state_dict(before.state_dict())
        assert after.step().limits.tolist() == before.state_dict()["learned"]["values"]["largest"].tolist()

    @pytest.mark.parametrize(
        ("saved", "now", "called"),
        [
            (
                ["0.parametrizations.weight.original0", "0.bias"],
                ["0.weight.original0"],
                ["0.weight.original0", "0.bias"],
            ),
            (["a.0.parametrizations.weight.original"], ["a.0.weight"], ["a.0.weight"]),
            (["parametrizations.weight"], ["root"], ["root"]),
            (["0.parametrizations.weight", "1"], ["0", "1"], ["0", "1"]),
            (
                ["0", "0.parametrizations.weight"],
                ["0"],
                [f"0{of} of an earlier release" for of in ("", ".parametrizations.weight")],
            ),
            # A module that somebody calls so.
            (["parametrizations.x"], ["parametrizations.x"], ["parametrizations.x"]),
        ],
    )
    def test_scopes_that_were_saved_before(self, saved: list[str], now: list[str], called: list[str]) -> None:
        assert as_called_now(saved, now) == called


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_has_nothing_to_replace() -> None:
    net = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Linear(4, 2))
    holder = Holder(net)
    assert len(holder.named()) == 4
    assert not holder.has_changed
