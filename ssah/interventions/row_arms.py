"""Arms in one batch: each row runs with units of its own taken out, and weights are read once.

Unit j puts out h_j B[:, j]. So a row runs without unit j if its h_j is multiplied by 0 before it
enters B: one factor for each row and channel, and the weights stay as they are. Two prompts under
three arms over three units, where arm 0 is intact, arm 1 without unit 2, arm 2 with half of unit 0:

    row of the batch   0 1 2 3 4 5            factors [arms, units]   1    1  1
    prompt             0 1 0 1 0 1                                    1    1  0
    arm                0 0 1 1 2 2                                    0.5  1  1

Greedy decoding is bound by reading weights, which all rows share. Where many tokens pass, a gated
FFN takes its factors together with its own product, act(gate) * up, in one operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssah.interventions.arm_units import arm_units
from ssah.interventions.columns import checked_modules
from ssah.interventions.fusing import fuses
from ssah.interventions.intervention import marked
from ssah.interventions.positions import Passes
from ssah.interventions.weights import Scale, Zero
from ssah.models import check_bare, check_idle, replaced_forward
from ssah.selections import Selection
from ssah.units import DepthTwoModule, GatedFFN, RoutedExperts, Routing, UnitSet
from ssah_kernels import ops

# The blocks of each decoder that are under way.
_RUNNING: weakref.WeakKeyDictionary[nn.Module, list[Arms]] = weakref.WeakKeyDictionary()
# What one arm takes out: units or heads, these times a number, or nothing.
Arm = UnitSet | Selection | Zero | Scale | None


def arms(model: nn.Module, selections: Sequence[Arm]) -> AbstractContextManager[Arms]:
    """Context manager: row i of a batch runs under the arm that it is given, as by `ablate`.

    Yields an `Arms`, which says what arm each row has. The weights are not touched, so that packed
    and offloaded ones will do. Blocks nest: the factors of both count. Inside, `freeze`,
    `train_only`, `prune` and `load_update` are refused, as inside `ablate`.

    Args:
        model: a model that `find_modules` knows.
        selections: of each arm a `UnitSet` to ablate, or a `Selection` of units and heads; a
            `Zero` or a `Scale` of one, which multiplies what units and heads put out (`intervene`
            scales every weight of a `Selection`); or None for the intact model.

    Raises:
        TypeError: a selection is something else.
        ValueError: there is none, units belong to another model, or a selection has something
            beside units and heads (a layer has its norms).

    Example: ``with ssah.arms(model, [None, groups["scu"]]) as run:``, then
    ``run.split(model.generate(**run.repeat(batch)))`` is ``[arms, rows, tokens]``.
    """
    check_idle(model, "to be run in several arms")
    if not selections:
        raise ValueError("selections is empty; it must have one selection, or None, for each arm")
    dtype = torch.promote_types(check_bare(model).dtype, torch.float32)  # of the factors
    modules: dict[str, DepthTwoModule] = {}
    tables: dict[str, Tensor] = {}
    for number, arm in enumerate(selections):
        if arm is None:
            continue
        chosen = arm.selection if isinstance(arm, Zero | Scale) else arm
        units = arm_units(model, chosen) if isinstance(chosen, Selection) else chosen
        if units is None:
            raise ValueError(
                f"selections[{number}] has entries beside units and heads, for which weights "
                "change that all arms share: run it by itself, inside ssah.ablate"
            )
        found = checked_modules(model, units)  # type: ignore[arg-type]  # which refuses other types
        assert isinstance(units, UnitSet)
        factor = arm.factor if isinstance(arm, Scale) else 0.0
        for name, module in found.items():
            if len(units[name]):
                modules[name] = module
                intact = torch.ones(len(selections), module.n_units, dtype=dtype)
                tables.setdefault(name, intact)[number, units[name]] = factor
    return _running(model, modules, Arms(len(selections), tables))


def rows_have_arms(model: nn.Module) -> bool:
    """Whether rows of a batch have arms of their own, so that no other batch may take its place."""
    return any(not run.alike for run in _RUNNING.get(check_bare(model).get_decoder(), ()))


class Arms:
    """Which arm each row of the next batches runs under.

    Attributes:
        n_arms: how many arms there are.
        alike: whether all rows have the arm of the first, however many there are.
    """

    def __init__(self, n_arms: int, tables: Mapping[str, Tensor]) -> None:
        """``tables``: B's name -> factors ``[arms, units]``."""
        self.n_arms, self.alike = n_arms, False
        self._tables = dict(tables)
        self._arm: Tensor | None = None  # int64 [rows]
        # Made as they are first wanted, and kept until other arms are assigned.
        self._arm_on: dict[torch.device, Tensor] = {}
        self._rows: dict[str, Tensor] = {}  # B's name -> [rows, units]

    def assign(self, arm: int | Sequence[int] | Tensor) -> None:
        """Row i of each batch from now on runs under arm ``arm[i]``: integers ``[rows]``.

        One number is the arm of all rows, however many.

        Raises:
            ValueError: there is no such arm, or no row.
        """
        given = torch.as_tensor(arm, device="cpu")
        self.alike = given.dim() == 0
        given = given.reshape(1) if self.alike else given
        whole = given.dim() == 1 and len(given) and not given.is_floating_point()
        if not whole or int(given.min()) < 0 or int(given.max()) >= self.n_arms:
            raise ValueError(
                f"arm is {given.tolist()}; must be [rows], numbers of arms from 0 to "
                f"{self.n_arms - 1}"
            )
        # Tensors of inference mode have no version, without which the operator would have to read
        # them in every layer; and the caller's own may be changed later.
        with torch.inference_mode(False):
            self._arm = given.to(torch.int64, copy=True)
        self._arm_on, self._rows = {}, {}

    def repeat(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch once for every arm, ``[arms * rows, ...]`` each, and the rows are assigned.

        Args:
            batch: tensors ``[rows, ...]``, such as ``input_ids`` and ``attention_mask``.

        Raises:
            ValueError: they have different numbers of rows.
        """
        sizes = {name: len(each) for name, each in batch.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"batch has {sizes} rows; must be tensors of equally many")
        rows = next(iter(sizes.values()))
        self.assign(torch.arange(self.n_arms).repeat_interleave(rows))
        return {name: torch.cat([each] * self.n_arms) for name, each in batch.items()}

    def split(self, output: Tensor) -> Tensor:
        """What came of a repeated batch, ``[arms * rows, ...]``, as ``[arms, rows, ...]``.

        Raises:
            ValueError: its rows are no multiple of the number of arms.
        """
        if len(output) % self.n_arms:
            raise ValueError(
                f"output has {len(output)} rows; must be a multiple of {self.n_arms} arms"
            )
        return output.unflatten(0, (self.n_arms, -1))

    def _check_rows(self, passes: Passes) -> None:
        """Refuse, with ValueError, a pass over other rows than were assigned."""
        if self.alike and self._arm is not None and passes.shape[0] != len(self._arm):
            self.assign(self._arm[:1].expand(passes.shape[0]))
            self.alike = True
        if self._arm is None or passes.shape[0] != len(self._arm):
            given = "none" if self._arm is None else len(self._arm)
            raise ValueError(
                f"arms of rows: {given} assigned, the batch has {passes.shape[0]} rows; must be "
                "equal (run.assign or run.repeat; beams are rows too)"
            )

    def _table(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``[arms, units]`` of the module ``name``, and arms ``[rows]``, where ``x`` is.

        ``x`` is ``[..., units]``; factors are in float32 at least.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.inference_mode(False):
            self._tables[name] = self._tables[name].to(x.device, wide)  # the module stays there
            if x.device not in self._arm_on:
                assert self._arm is not None
                self._arm_on[x.device] = self._arm.to(x.device)
        return self._tables[name], self._arm_on[x.device]

    def _factors(self, name: str, x: Tensor) -> Tensor:
        """Factors of each row of the module ``name``, ``[rows, units]``, where and what ``x`` is.

        ``x`` is ``[..., units]``.
        """
        rows = self._rows.get(name)
        if rows is None or rows.device != x.device or rows.dtype != x.dtype:
            table, arm = self._table(name, x)
            with torch.inference_mode(False):  # a later pass may want gradients
                rows = self._rows[name] = table[arm].to(x.dtype)
        return rows

    def _multiplied(self, name: str, x: Tensor) -> Tensor:
        """``x`` times the factors of its rows, which lie one after the other: ``[..., units]``."""
        factors = self._factors(name, x)  # [rows, units]
        by_row = x.reshape(len(factors), -1, x.shape[-1])  # [rows, tokens, units]
        return (by_row * factors[:, None]).view(x.shape)


@contextmanager
def _running(model: nn.Module, modules: Mapping[str, DepthTwoModule], run: Arms) -> Iterator[Arms]:
    """Inside, channels that enter the B of ``modules`` are multiplied by the factors of ``run``."""
    passes = Passes(model)
    routed: dict[nn.Module, list[DepthTwoModule]] = {}
    with ExitStack() as stack:
        stack.enter_context(marked([each.down for each in modules.values()], "arms"))

        def begin(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            passes.hook(decoder, args, kwargs)
            run._check_rows(passes)

        hook = passes.decoder.register_forward_pre_hook(begin, with_kwargs=True)
        stack.callback(hook.remove)
        _RUNNING.setdefault(passes.decoder, []).append(run)
        stack.callback(_RUNNING[passes.decoder].remove, run)
        for name, module in modules.items():
            gated = module.gated
            if module.routed is not None:
                routed.setdefault(module.down, []).append(module)
            elif gated is not None and gated.is_plain:
                product = _gated_forward(run, name, gated, module.down)
                stack.enter_context(replaced_forward(gated.module, product))
            else:
                hook = module.down.register_forward_pre_hook(_multiply(run, name))
                stack.callback(hook.remove)
        for experts in routed.values():
            assert experts[0].routed is not None
            names = {each.expert: each.name for each in experts}
            forward = _routed_forward(run, experts[0].routed, names, passes)
            stack.enter_context(replaced_forward(experts[0].down, forward))
        yield run


def _multiply(run: Arms, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A pre-hook of B, which is given ``[rows, tokens, units]``, or the rows after each other."""
    return lambda _, args: (run._multiplied(name, args[0]), *args[1:])


def _gated_forward(
    run: Arms, name: str, gated: GatedFFN, down: nn.Module
) -> Callable[[Tensor], Tensor]:
    """A forward of a gated FFN whose product takes the factors in the same pass."""

    def forward(x: Tensor) -> Tensor:  # [rows, tokens, hidden], or the rows after each other
        gate, up = gated.project(x)  # [..., units] each
        if not fuses(gated.activation, gate):
            return down(run._multiplied(name, gated.activation(gate) * up))
        factors, arm = run._table(name, gate)
        shape = gate.shape
        gate, up = (each.reshape(len(arm), -1, shape[-1]) for each in (gate, up))
        product = ops.gated_product(gate, up, factors, arm, act=gated.act)  # [rows, tokens, units]
        return down(product.view(shape))

    return forward


def _routed_forward(
    run: Arms, experts: RoutedExperts, names: Mapping[int | None, str], passes: Passes
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward of experts: tokens of all rows are mixed there, and hooks do not see which."""

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        # x: [..., hidden]; chosen, weights: [..., top_k], the experts of each token and their part.
        shape = x.shape
        x, chosen, weights = (each.flatten(0, -2) for each in (x, chosen, weights))  # [tokens, ...]
        length = len(x) // passes.shape[0]  # tokens of one row; rows lie one after the other

        routing = Routing.of(chosen, experts.n_experts)
        a = experts.gate(experts.project(x[routing.token], routing))  # [pairs, units]
        own = [run._factors(names[e], a) if e in names else None for e in range(experts.n_experts)]
        ones = torch.ones_like(next(each for each in own if each is not None))
        factors = torch.stack([ones if each is None else each for each in own])
        # [experts, rows, units] -> [pairs, units]
        a = a * factors[routing.expert, routing.token // length]
        return routing.weighed(experts.put_out(a, routing), weights).to(x.dtype).view(shape)

    return forward
