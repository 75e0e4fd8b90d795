"""Methods that are made in Python and pass through configurations: they come out as they went in."""

from dataclasses import dataclass

import hydra_zen
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf, _utils
from torch import Tensor

from lightning_gradclip import ClipMethod, GradientClipping, NormClip, ZClip
from lightning_gradclip.methods import objects

TARGET = "lightning_gradclip.GradientClipping"


@dataclass(kw_only=True)
class HalfClip(ClipMethod):
    """A method of the user's own, with an argument that a built-in one has as well."""

    max_norm: float = 7.0

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return size.new_full(size.shape, self.max_norm / 2)


@pytest.fixture(params=[HalfClip(max_norm=3.0), NormClip(max_norm={0: 1.0, 5: 2.0}), ZClip(z_threshold=4.0)], ids=repr)
def method(request: pytest.FixtureRequest) -> ClipMethod:
    return request.param


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
def test_a_method_passes_as_an_object(method: ClipMethod, convert: str) -> None:
    option = OmegaConf.create(
        {"_target_": TARGET, "method": {"_target_": "lightning_gradclip.NormClip", "max_norm": 1.0, "per": "layer"}}
    )
    holding = OmegaConf.create({"_target_": TARGET, "method": method}, flags={"allow_objects": True})
    for callback in (
        instantiate(option, method=method, _convert_=convert),
        instantiate({"_target_": TARGET}, method=method, _convert_=convert),
        instantiate({"_target_": TARGET, "method": method}, _convert_=convert),
        instantiate(OmegaConf.create({"_target_": TARGET, "method": method}), _convert_=convert),
        instantiate(holding, _convert_=convert),
    ):
        assert type(callback.method) is type(method)
        assert callback.method == method


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
def test_a_method_passes_through_hydra_zen(method: ClipMethod, convert: str) -> None:
    clipping = hydra_zen.builds(GradientClipping, populate_full_signature=True)
    for callback in (
        instantiate(clipping, method=method, _convert_=convert),
        instantiate(clipping(method=method), _convert_=convert),
        instantiate(hydra_zen.builds(GradientClipping, method=method), _convert_=convert),
    ):
        assert type(callback.method) is type(method)
        assert callback.method == method


def test_a_method_of_ones_own_in_a_file() -> None:
    node = {"_target_": TARGET, "method": {"_target_": f"{__name__}.HalfClip", "max_norm": 2.0}}
    assert instantiate(node).method == HalfClip(max_norm=2.0)


@pytest.mark.parametrize("missing", ["is_dataclass", "is_primitive_type_annotation"])
def test_an_omegaconf_that_cannot_be_told_is_named(missing: str) -> None:
    names = {name: value for name, value in vars(_utils).items() if name != missing}
    said = (
        f"^OmegaConf 2.* takes the fields of clipping methods for .* no '{missing}'; give instantiate\\(\\) a _target_ "
    )
    with pytest.warns(UserWarning, match=said):
        objects.tell(names)
    assert names == {name: value for name, value in vars(_utils).items() if name != missing}
