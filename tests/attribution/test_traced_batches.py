"""A batch of ``attribute``, and a step, are one graph on a GPU: traced without values or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plans import draw
from pretend_gpu import guarded, replace_tensors
from tiny_models import build
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ssah.attribution.sums import new_sums
from ssah.attribution.watch import watching
from ssah.training import freeze
from ssah.units import find_modules
from ssah_kernels import ops

GPU = torch.device("cuda", 0)


@pytest.fixture
def traced() -> Iterator[Callable[..., tuple[Any, list[fx.Node]]]]:
    """Traces a call on tensors without values, where a graph break is an error: what it returns,
    and the calls of this project's operators in its graph."""

    def trace(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[fx.Node]]:
        graphs: list[fx.GraphModule] = []

        def backend(graph: fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        out = torch.compile(function, fullgraph=True, backend=backend)(*args, **kwargs)
        (graph,) = graphs
        return out, [node for node in graph.graph.nodes if str(node.target).startswith("ssah.")]

    # A plan's indices go to the device from the host.
    with guarded(GPU), FakeTensorMode(allow_non_fake_inputs=True):
        yield trace
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "padded", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["whole", "padded"]
)
def test_a_batch_is_one_graph(padded: bool, traced: Callable[..., Any]) -> None:
    with unset_fake_temporarily():
        model = build("llama").eval()
        modules = find_modules(model)
    replace_tensors(model, lambda x: torch.empty(x.shape, dtype=x.dtype, device=GPU))
    sums = new_sums(modules)
    ids = torch.zeros(2, 7, dtype=torch.int64, device=GPU)
    with torch.no_grad(), watching(modules, sums, gradient=False) as watch:
        if padded:
            watch.token_mask = torch.empty(2, 7, dtype=torch.bool, device=GPU)
            watch.needed = torch.empty(11, dtype=torch.int64, device=GPU)
        out, calls = traced(model.base_model, input_ids=ids, use_cache=False)
    assert out.last_hidden_state.shape == (2, 7, model.config.hidden_size)
    assert out.last_hidden_state.device == GPU
    assert len(calls) == len(modules)
    gated = [n.meta["example_value"] for n in calls if "gated_moments" in str(n.target)]
    assert len(gated) == model.config.num_hidden_layers
    for product in gated:
        assert product.shape == (11 if padded else 14, model.config.intermediate_size)
        assert product.device == GPU


def test_a_clipped_step_is_one_graph(traced: Callable[..., Any]) -> None:
    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, index: Tensor) -> Tensor:
        norm = ops.masked_grad_norm([g], [None], [0])
        clip = (1 / norm).clamp(max=1)
        ops.masked_adamw_([p], [g], [m], [v], [index], [0], norm, norm, None, clip)
        return norm

    half = {"dtype": torch.bfloat16, "device": GPU}
    weight, *compact = (torch.empty(n, 5, **half) for n in (6, 2, 2, 2))
    index = torch.empty(2, dtype=torch.int64, device=GPU)
    norm, calls = traced(step, weight, *compact, index)
    assert (norm.shape, norm.device) == ((), GPU)
    assert [str(node.target) for node in calls] == ["ssah.masked_grad_norm", "ssah.masked_adamw_"]


@pytest.fixture
def new_parameters() -> Iterator[None]:
    """A model that moves gets new parameters; torch cannot change the data of those that it has."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_the_loss_under_a_plan_is_one_graph(
    traced: Callable[..., Any], new_parameters: None
) -> None:
    """Its backward pass needs a GPU, and its step is traced above."""
    with unset_fake_temporarily():
        model = build("llama")
        plan = freeze(model, draw(model, 0.3))
    model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=GPU))
    ids = torch.zeros(2, 7, dtype=torch.int64, device=GPU)
    out, _ = traced(model, input_ids=ids, labels=ids, use_cache=False)
    assert (out.loss.shape, out.loss.device) == ((), GPU)
    assert out.loss.requires_grad
    assert out.logits.shape == (2, 7, model.config.vocab_size)
    assert {p.device for p in model.parameters() if p.requires_grad} == {GPU}
    assert not plan.closed
