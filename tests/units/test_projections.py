"""Projections that do not compute what their weight says: handled as they are, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import assert_equal, batch, draw, snapshot
from tiny_models import build
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import ssah
from ssah.models import scheme_of
from ssah.units import find_modules


class Halved(nn.Module):
    """A parametrisation: half of what is stored."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.2)


def pruned_twice(module: nn.Module) -> None:
    pruned(module)
    prune.random_structured(module, "weight", amount=0.1, dim=0)


def halved(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Halved())


def halved_bias(module: nn.Module) -> None:
    module.bias = nn.Parameter(torch.ones(module.weight.shape[0]))
    parametrize.register_parametrization(module, "bias", Halved())


def plain_tensor(module: nn.Module) -> None:
    weight = module.weight.detach().clone()
    del module.weight
    module.weight = weight


# How a weight may be computed anew, and what its refusal names.
COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "prune": (pruned, r"prune\.remove\(module, 'weight'\)"),
    "prune twice": (pruned_twice, r"prune\.remove\(module, 'weight'\)"),
    "parametrize": (halved, r"remove_parametrizations\(module, 'weight'\)"),
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "old weight_norm": (weight_norm, r"remove_weight_norm\(module, 'weight'\)"),
    "old spectral_norm": (spectral_norm, r"remove_spectral_norm\(module, 'weight'\)"),
    "plain tensor": (plain_tensor, r"module\.weight = torch\.nn\.Parameter"),
}
# Last layer first: there B is spared where nothing hangs on it.
DOWN, UP, VALUE = (
    "model.layers.1.mlp.down_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.v_proj",
)
computed = pytest.mark.parametrize("how", COMPUTED)
# torch itself warns that the old functions are deprecated.
old = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch()).logits
    return out


def without(model: PreTrainedModel, units: ssah.UnitSet) -> Tensor:
    """Logits where hooks set the units' channels to zero before they enter B."""
    hooks = []
    for name in units:
        keep = (~units.mask(name)).to(model.dtype)

        def hook(_: nn.Module, args: tuple[Tensor], keep: Tensor = keep) -> tuple[Tensor]:
            return (args[0] * keep,)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    found = logits(model)
    for each in hooks:
        each.remove()
    return found


@old
@computed
def test_units_of_a_computed_weight_are_ablated(how: str) -> None:
    model = build("llama")
    COMPUTED[how][0](model.get_submodule(DOWN))
    units, before, whole = draw(model), snapshot(model), logits(model)
    expected = without(model, units)
    with ssah.ablate(model, units):
        inside = logits(model)
    torch.testing.assert_close(inside, expected)
    assert not torch.allclose(inside, whole)
    assert torch.equal(logits(model), whole)
    assert_equal(snapshot(model), before)


@old
@computed
@pytest.mark.parametrize("name", [DOWN, UP, VALUE])
@pytest.mark.parametrize("what", ["freeze", "train_only", "prune", "load_update"])
def test_a_computed_weight_is_not_changed(how: str, name: str, what: str, updated: Path) -> None:
    model = build("llama")
    units = draw(model)
    change, message = COMPUTED[how]
    change(model.get_submodule(name))
    before = snapshot(model)
    given = updated if what == "load_update" else units
    with pytest.raises(ValueError, match=f"{name}.weight.*{message}"):
        getattr(ssah, what)(model, given)
    assert_equal(snapshot(model), before)


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An update of the model that the tests here begin with."""
    folder = tmp_path_factory.mktemp("update")
    model = build("llama")
    with ssah.freeze(model, draw(model)) as plan:
        plan.save_pretrained(folder)
    return folder


def test_a_computed_bias_is_not_changed() -> None:
    model = build("llama")
    halved_bias(model.get_submodule(UP))
    with pytest.raises(ValueError, match=f"{UP}.bias.*remove_parametrizations"):
        ssah.prune(model, draw(model))


def test_computed_weights_of_experts_are_refused() -> None:
    model = build("mixtral")
    name = next(n for n, module in model.named_modules() if n.endswith(".experts"))
    parametrize.register_parametrization(model.get_submodule(name), "down_proj", Halved())
    for change in (ssah.ablate, ssah.prune, ssah.freeze):
        with pytest.raises(ValueError, match=r"experts\.down_proj' is no parameter"):
            change(model, draw(model))


@old
@computed
@pytest.mark.parametrize("metric", ["variance", "taylor"])
def test_scores_are_those_of_the_weight_that_is_computed(how: str, metric: str) -> None:
    model, same = build("llama").double(), build("llama").double()
    for name in (DOWN, UP, VALUE):
        module = model.get_submodule(name)
        COMPUTED[how][0](module)
        logits(model)
        with torch.no_grad():
            same.get_submodule(name).weight.copy_(module.weight)
    found = ssah.attribute(model, [batch()], metric=metric).scores
    for name, expected in ssah.attribute(same, [batch()], metric=metric).scores.items():
        torch.testing.assert_close(found[name], expected)


# ------------------------------------------------------------------------------- other forwards


class Scaled(nn.Linear):
    """As FP8Linear, AutoBitLinear and QLinear: a weight that is not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Adapted(nn.Linear):
    """As loralib's Linear: a low-rank part beside the weight."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.low_rank = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.low_rank


class ScaledConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


def replace(model: PreTrainedModel, name: str, new: nn.Module) -> None:
    new.load_state_dict(model.get_submodule(name).state_dict(), strict=False)
    model.set_submodule(name, new)


def swapped(model: PreTrainedModel, name: str, kind: type[nn.Module]) -> None:
    old = model.get_submodule(name)
    if isinstance(old, Conv1D):
        replace(model, name, kind(old.nf, old.nx))
    else:
        replace(model, name, kind(old.in_features, old.out_features, bias=old.bias is not None))


@pytest.mark.parametrize("kind", [Scaled, Adapted])
@pytest.mark.parametrize("name", [DOWN, UP, VALUE])
def test_a_linear_with_another_forward_is_refused(kind: type[nn.Module], name: str) -> None:
    model = build("llama")
    units = draw(model)
    swapped(model, name, kind)
    message = f"{name}' is a {kind.__name__} .*whose forward is not that of nn.Linear"
    refuses_everything(model, units, message)


def test_a_conv1d_with_another_forward_is_refused() -> None:
    model = build("gpt2")
    units = draw(model)
    swapped(model, "transformer.h.0.mlp.c_proj", ScaledConv1D)
    refuses_everything(model, units, "ScaledConv1D .*whose forward is not that of")


def refuses_everything(model: PreTrainedModel, units: ssah.UnitSet, message: str) -> None:
    """Refused before anything is computed: nothing is read of the loader."""

    def loader() -> Any:
        raise AssertionError("read")
        yield

    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        ssah.attribute(model, loader())
    for change in (ssah.ablate, ssah.prune, ssah.freeze, ssah.train_only):
        with pytest.raises(ValueError, match=message):
            change(model, units)
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("kind", [Named, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_a_linear_with_the_same_forward_is_taken(kind: type[nn.Module]) -> None:
    model, same = build("llama"), build("llama")
    units = draw(model)
    for name in (DOWN, UP, VALUE):
        swapped(model, name, kind)
    expected = ssah.attribute(same, [batch()]).scores
    for name, scores in ssah.attribute(model, [batch()]).scores.items():
        assert torch.equal(scores, expected[name])
    before = snapshot(model)
    with ssah.freeze(model, units) as plan:
        model(**batch()).logits.sum().backward()
        plan.verify()
    assert_equal(snapshot(model), before)
    assert type(model.get_submodule(DOWN)) is kind


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("transformers.integrations.finegrained_fp8", "FP8Linear"),
        ("transformers.integrations.bitnet", "AutoBitLinear"),
    ],
)
def test_quantised_linears_of_transformers_are_refused(place: str, name: str) -> None:
    kind = getattr(pytest.importorskip(place), name)
    model = build("llama")
    units = draw(model)
    model.set_submodule(UP, kind(48, 72))
    for tensor in model.get_submodule(UP).state_dict().values():
        tensor.zero_()
    assert scheme_of(model.get_submodule(UP)) is None
    refuses_everything(model, units, f"is a {name} .*dequantise")


def test_weights_that_are_no_numbers_to_compute_with_are_refused() -> None:
    model = build("llama")
    units = draw(model)
    linear = model.get_submodule(DOWN)
    linear.weight.data = linear.weight.data.to(torch.float8_e4m3fn)
    refuses_everything(model, units, f"{DOWN}.weight' is torch.float8_e4m3fn, must be one of")


def test_experts_of_other_numbers_are_refused() -> None:
    model = build("mixtral")
    units = draw(model)
    name = next(n for n, module in model.named_modules() if n.endswith(".experts"))
    experts = model.get_submodule(name)
    experts.gate_up_proj.data = experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    refuses_everything(model, units, "gate_up_proj' is torch.float8_e4m3fn")


class Wrapped(torch.Tensor):
    """A tensor subclass that nobody has registered."""


def test_tensor_subclasses_are_refused() -> None:
    model = build("llama")
    units = draw(model)
    linear = model.get_submodule(DOWN)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), requires_grad=False)
    message = "is a Wrapped"
    with pytest.raises(ValueError, match=message):
        ssah.attribute(model, [batch()])
    with pytest.raises(ValueError, match=message):
        ssah.ablate(model, units)


@pytest.mark.parametrize(("family", "end"), [("llama", "v_proj"), ("mixtral", ".experts")])
def test_a_forward_that_was_replaced_is_refused(family: str, end: str) -> None:
    model = build(family)
    units = draw(model)
    module = next(module for name, module in model.named_modules() if name.endswith(end))
    own = module.forward
    module.forward = lambda *args: 2 * own(*args)
    refuses_everything(model, units, "forward")


def test_experts_of_a_subclass_with_its_own_forward_are_refused() -> None:
    model = build("mixtral")
    units = draw(model)
    module = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    kind = type(module)
    module.__class__ = type("Other", (kind,), {"forward": lambda self, *args: args[0]})
    refuses_everything(model, units, "Other.* has a forward of its own")


def test_an_ffn_of_another_class_is_watched_and_not_fused() -> None:
    """Its forward may compute anything; what enters B is read where it enters."""
    model = build("llama")
    ffn = model.model.layers[0].mlp

    class Tripled(type(ffn)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(3 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    name = "model.layers.0.mlp.down_proj"
    plain = ssah.attribute(model, [batch()], modules="mlp").scores[name]
    ffn.__class__ = Tripled
    found = ssah.attribute(model, [batch()], modules="mlp").scores[name]
    torch.testing.assert_close(found, 9 * plain, rtol=1e-5, atol=0)
    assert find_modules(model)[name].gated is None
