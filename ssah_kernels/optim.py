"""Optimisers over the masked update operators: what is not trained costs and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssah_kernels import ops, options
from ssah_kernels.sharded import (
    Dim,
    Part,
    compact,
    cut,
    expand,
    first_row,
    is_sharded,
    join,
    local,
    parts,
)

COMPENSATED = (torch.bfloat16, torch.float16)
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: calls of one step get seeds far apart


@dataclass
class _Call:
    """The tensors of one call of an operator: one dtype, one device, one step."""

    number: int  # of its first parameter in the optimiser: tells calls of one step apart
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    indices: list[Tensor | None] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # counted once the call is done

    def state(self, name: str) -> list[Tensor] | None:
        return [s[name] for s in self.states] if name in self.states[0] else None


class _MaskedOptimizer(Optimizer):
    """What MaskedAdamW and MaskedSGD share: groups, state, clipping, importance, checkpoints."""

    state_names: tuple[str, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "indices": None, "dims": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``indices`` and ``dims`` are lists with one entry a parameter.

        Of a parameter that is sharded and holds experts, a dimension may be a pair, see
        :mod:`ssah_kernels.sharded`.

        Raises:
            TypeError, ValueError: an option is wrong, a parameter is given twice, indices or dims
                do not fit, or a parameter has nothing to train. The group is not added then.
        """
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self._check_last_group()
        except BaseException:
            del self.param_groups[before:]
            raise

    def _check_last_group(self) -> None:
        group = self.param_groups[-1]
        options.check(group)
        options.check_parameters(self.param_groups)
        params = group["params"]
        group["indices"] = options.as_list("indices", group["indices"], len(params), None)
        group["dims"] = options.as_list("dims", group["dims"], len(params), 0)
        for i, p in enumerate(params):
            if is_sharded(p) and (group["max_norm"] is not None or group["track_importance"]):
                raise ValueError(
                    f"params[{i}] is sharded: max_norm must be None (clip with "
                    "torch.nn.utils.clip_grad_norm_) and track_importance False"
                )
            index, dim = group["indices"][i], group["dims"][i]
            group["indices"][i] = options.entries(f"[{i}]", p, index, dim)

    def _entries(self) -> Iterator[tuple[int, dict[str, Any], Tensor, Tensor | None, Dim]]:
        number = 0
        for group in self.param_groups:
            for p, index, dim in zip(group["params"], group["indices"], group["dims"], strict=True):
                yield number, group, p, index, dim
                number += 1

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names

    def _new_state(self, group: dict[str, Any], grad: Tensor, dim: int) -> dict[str, Any]:
        """Zero state for a compact gradient."""
        dtype = group["state_dtype"] or torch.float32
        if grad.dtype == torch.float64:
            dtype = torch.float64
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float64)}
        for name in self._names(group):
            state[name] = torch.zeros(grad.shape, dtype=dtype, device=grad.device)
        if group["rounding"] == "kahan" and grad.dtype in COMPENSATED:
            state["compensation"] = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
        if group["track_importance"]:
            units = grad.shape[dim] if grad.dim() else 1
            for name in ("importance_signed", "importance_squared"):
                state[name] = torch.zeros(units, dtype=torch.float64, device=grad.device)
        return state

    def _calls(self) -> list[tuple[dict[str, Any], _Call]]:
        """The work of one step."""
        calls: dict[tuple[Any, ...], tuple[dict[str, Any], _Call]] = {}
        for number, group, p, index, dim in self._entries():
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise TypeError("a gradient is sparse; it must be dense")
            pieces = parts(p, index, dim) if is_sharded(p) else [Part(index, dim)]  # type: ignore[arg-type]
            if is_sharded(p):
                number += first_row(p) << 32  # other noise on every rank
            grads = [part.entries(local(p.grad)) for part in pieces]
            state = self.state[p]
            if not state:
                state.update(self._new_state(group, join(grads), pieces[0].dim))
            key = (id(group), p.dtype, p.device, float(state["step"]))
            for part, grad, own in zip(pieces, grads, _cut_state(state, grads), strict=True):
                if is_sharded(p) and not grad.numel():
                    continue
                call = calls.setdefault(key, (group, _Call(number)))[1]
                call.params.append(part.rows(local(p)))
                call.grads.append(grad)
                call.indices.append(part.index)
                call.dims.append(part.dim)
                call.states.append(own)
            if key in calls:
                calls[key][1].steps.append(state["step"])
            else:
                state["step"] += 1  # nothing of it is on this rank
        return list(calls.values())

    def _clip_coefs(self, calls: list[tuple[dict[str, Any], _Call]]) -> list[Tensor | None]:
        """Per call, the factor that brings the norm of all gradients to at most max_norm."""
        total: Tensor | None = None
        for group, call in calls:
            if group["max_norm"] is not None:
                none: list[Tensor | None] = [None] * len(call.grads)
                norm = ops.masked_grad_norm(call.grads, none, call.dims)
                total = norm if total is None else total.to(norm.device).hypot(norm)
        return [
            (group["max_norm"] / (total.to(call.params[0].device) + 1e-6)).clamp(max=1)
            if group["max_norm"] is not None and total is not None
            else None
            for group, call in calls
        ]

    def _update(
        self,
        group: dict[str, Any],
        call: _Call,
        lr: Tensor,
        step: Tensor,
        clip_coef: Tensor | None,
        seed: Tensor | None,
    ) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options.check_lr(group["lr"])
        calls = self._calls()
        for (group, call), clip_coef in zip(calls, self._clip_coefs(calls), strict=True):
            device = call.params[0].device
            lr = torch.as_tensor(group["lr"], dtype=torch.float64).to(device)
            step = (call.steps[0] + 1).to(device)
            seed = None
            if group["rounding"] != "nearest":
                word = (group["seed"] + _SEED_STRIDE * call.number + (1 << 63)) % (1 << 64)
                seed = torch.tensor(word - (1 << 63), dtype=torch.int64, device=device)
            self._update(group, call, lr, step, clip_coef, seed)
            for count in call.steps:
                count += 1
        return loss

    def importance(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Every parameter's (signed, squared) importance, summed over the steps so far.

        signed is the sum over steps of each trained unit's sum of p * g, squared that of (p * g)^2,
        taken before each update with gradients before clipping: float64 [units] on the parameter's
        device, along ``dims`` (default 0). Of a parameter without a step there is none.

        Raises:
            RuntimeError: no parameter group has ``track_importance``.
        """
        if not any(group["track_importance"] for group in self.param_groups):
            raise RuntimeError("importance needs track_importance=True when the optimiser is made")
        return {
            p: (state["importance_signed"], state["importance_squared"])
            for p, state in self.state.items()
            if "importance_signed" in state
        }

    def state_dict(self) -> dict[str, Any]:
        """As every optimiser's. State of a sharded parameter is a DTensor of its whole shape, zero
        where nothing trains, so that a checkpoint can be read by any number of ranks."""
        result = super().state_dict()
        numbers = (n for group in result["param_groups"] for n in group["params"])
        for (_, _, p, index, dim), n in zip(self._entries(), numbers, strict=True):
            if is_sharded(p) and n in result["state"]:
                result["state"][n] = {
                    name: value if name == "step" else expand(p, value, index, dim)
                    for name, value in result["state"][n].items()
                }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: options, step counts (which the rounding noise follows) and state, in the dtype
        that the state was saved in.

        Raises:
            ValueError: the checkpoint is of other parameters, or trains other entries of them.
        """
        current = [(group["indices"], group["dims"]) for group in self.param_groups]
        saved = [(group.get("indices"), group.get("dims")) for group in state_dict["param_groups"]]
        if len(current) == len(saved):
            for i, (mine, its) in enumerate(zip(current, saved, strict=True)):
                _check_same_entries(i, mine, its)
        super().load_state_dict(state_dict)  # casts state to the parameter's dtype: put it back
        for group, (indices, dims) in zip(self.param_groups, current, strict=True):
            group["indices"], group["dims"] = indices, dims
        numbers = (n for group in state_dict["param_groups"] for n in group["params"])
        for (_, _, p, index, dim), n in zip(self._entries(), numbers, strict=True):
            shape = list(p.shape)
            if index is not None and isinstance(dim, int):
                shape[dim] = len(index)
            for name, value in state_dict["state"].get(n, {}).items():
                if is_sharded(p) and name != "step":
                    value = compact(p, value, index, dim)
                elif name in self.state_names and list(value.shape) != shape:
                    raise ValueError(
                        f"{name} of parameter {n} has shape {list(value.shape)} in the checkpoint; "
                        f"it must be {shape}: was it saved with another selection of units?"
                    )
                device = "cpu" if name == "step" else p.device
                self.state[p][name] = value.detach().to(device, copy=True)


def _cut_state(state: dict[str, Any], grads: list[Tensor]) -> list[dict[str, Any]]:
    """The state of every piece of a parameter: views."""
    if len(grads) == 1:
        return [state]
    pieces = {name: cut(value, grads) for name, value in state.items() if name != "step"}
    return [
        {"step": state["step"], **{name: each[i] for name, each in pieces.items()}}
        for i in range(len(grads))
    ]


def _check_same_entries(number: int, mine: tuple[Any, ...], its: tuple[Any, ...]) -> None:
    """Raise unless a checkpoint's group trains what this optimiser's group trains."""
    if its[0] is None or len(its[0]) != len(mine[0]):
        return  # torch says that the number of parameters differs
    for i, (index, saved) in enumerate(zip(mine[0], its[0], strict=True)):
        same = index is saved or (
            index is not None and saved is not None and torch.equal(index.cpu(), saved.cpu())
        )
        if not same or mine[1][i] != its[1][i]:
            raise ValueError(
                f"parameter {i} of group {number} trains other entries than in the checkpoint; "
                "resume with the same units, or start a new optimiser"
            )


class MaskedAdamW(_MaskedOptimizer):
    """AdamW whose parameters are compact slices, or dense ones of which some entries train.

    Computes what ``torch.optim.AdamW`` computes for the trained elements; the others stay bit for
    bit what they were, weight decay and stale momentum included.

    Args:
        params: parameters or parameter groups. A group may carry ``indices``: per parameter an
            int64 tensor, strictly increasing, of the entries that train along ``dims`` (default 0),
            or None for all. State is compact; so is the copy of the gradient's trained entries.
        lr: a float, or a tensor of one element.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        state_dtype: of both moments: float32, bfloat16, or None (float32; float64 for float64
            parameters).
        rounding: how bfloat16 parameters without a master copy are stored: ``"nearest"``;
            ``"stochastic"``, which is unbiased; ``"kahan"``, with a compensation in bfloat16.
            bfloat16 state is rounded stochastically by the last two. float16 parameters take
            ``"nearest"`` or ``"kahan"``; nothing of it touches float32.
        seed: of the rounding noise, with the step: a resumed run repeats the uninterrupted one.
        max_norm: clip the norm of all gradients together to this, inside the update.
        track_importance: accumulate every unit's sum of p * g and (p * g)^2, see ``importance``.

    Raises:
        ValueError: an option is out of range, or a parameter has nothing to train.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        max_norm: float | None = None,
        track_importance: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
            "max_norm": max_norm,
            "track_importance": track_importance,
        }
        super().__init__(params, defaults)

    def _update(
        self,
        group: dict[str, Any],
        call: _Call,
        lr: Tensor,
        step: Tensor,
        clip_coef: Tensor | None,
        seed: Tensor | None,
    ) -> None:
        ops.masked_adamw_(
            call.params,
            call.grads,
            [state["exp_avg"] for state in call.states],
            [state["exp_avg_sq"] for state in call.states],
            call.indices,
            call.dims,
            lr,
            step,
            None,
            clip_coef,
            seed,
            call.state("compensation"),
            call.state("importance_signed"),
            call.state("importance_squared"),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )


class MaskedSGD(_MaskedOptimizer):
    """SGD with momentum in the same form: see ``MaskedAdamW`` for what the options mean.

    Args:
        momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.

    Raises:
        ValueError: an option is out of range, or a parameter has nothing to train.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        max_norm: float | None = None,
        track_importance: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
            "max_norm": max_norm,
            "track_importance": track_importance,
        }
        super().__init__(params, defaults)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()

    def _update(
        self,
        group: dict[str, Any],
        call: _Call,
        lr: Tensor,
        step: Tensor,
        clip_coef: Tensor | None,
        seed: Tensor | None,
    ) -> None:
        ops.masked_sgd_(
            call.params,
            call.grads,
            call.state("momentum_buffer"),
            call.indices,
            call.dims,
            lr,
            step,
            None,
            clip_coef,
            seed,
            call.state("compensation"),
            call.state("importance_signed"),
            call.state("importance_squared"),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
