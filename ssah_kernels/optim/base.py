"""What ``MaskedAdamW`` and ``MaskedSGD`` share: groups, the calls of a step, clipping, importance.

A step, of every parameter that has a gradient:

1. Entries of one group, dtype, device and step count become one call of the operator.
2. With ``max_norm``, one norm is taken over the calls of all groups that clip. Each of these gets
   the factor min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` has it. The
   operator multiplies by it while it reads the gradient, which costs no pass of its own.
3. The operator updates parameters and state in place, once over the trained elements. It reads
   their gradients where they are: of [1000, 64] and 200 rows, these rows alone, with no copy.

Nothing here waits for a GPU: numbers that live on a device stay there. So whether a step was
skipped, because ``torch.amp.GradScaler`` found a gradient that overflowed, only the device knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops
from ..checks.compact import COMPENSATIONS
from ..dynamic_map import scales_shape
from ..sharded import Cut, Dim, Part, first_row, is_sharded, local, may_be_sharded
from . import checkpoint, options
from .calls import Call, Scalars, count_of, scales_of

# Number in the optimiser, group, parameter, index [trained] and dimension.
Entry: TypeAlias = "tuple[int, dict[str, Any], Tensor, Tensor | None, Dim]"


class MaskedOptimizer(Optimizer):
    """An optimiser whose step is one call of an operator for all that can be updated alike."""

    state_names: tuple[str, ...] = ()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler``, which reads this, leaves unscaling to the step."""
        return True

    def _of_scaler(self, name: str) -> Tensor | None:
        """``grad_scale`` or ``found_inf``, float32 [], which a scaler sets for its ``step``."""
        # It asks whether there is a grad_scale, and multiplies: no default may stand there.
        return getattr(self, name, None)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._cuts: dict[Tensor, Cut] = {}
        super().__init__(params, {**defaults, "indices": None, "dims": None})

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``indices`` and ``dims`` are lists with one entry a parameter.

        Of a parameter that holds experts, a dimension may be a pair, see
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
            # A rank sees its own rows alone: a norm or a sum over units would need the others'.
            if is_sharded(p) and (group["max_norm"] is not None or group["track_importance"]):
                raise ValueError(
                    f"params[{i}] is sharded: max_norm must be None (clip with "
                    "torch.nn.utils.clip_grad_norm_) and track_importance False"
                )
            # Its state lies flat, one expert behind the other, and so has no rows for the blocks.
            eight = group["state_dtype"] == options.EIGHT_BIT
            if isinstance(group["dims"][i], tuple) and (eight or group["track_importance"]):
                raise ValueError(
                    f"params[{i}] holds experts, of which some units train: state_dtype must not "
                    f"be {options.EIGHT_BIT!r} (use torch.bfloat16), and track_importance be False"
                )
            index, dim = group["indices"][i], group["dims"][i]
            group["indices"][i] = options.entries(f"[{i}]", p, index, dim)

    def entries(self) -> Iterator[Entry]:
        """Number, group, parameter, index [trained] and dimension of every parameter."""
        number = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                index = group["indices"][i]
                if index is not None and index.device != p.device:
                    # accelerate shards parameters, and puts the pieces in their place elsewhere.
                    index = group["indices"][i] = index.to(p.device)
                yield number, group, p, index, group["dims"][i]
                number += 1

    # --------------------------------------------------------------------------------------- step

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names

    def _new_state(
        self, group: dict[str, Any], shape: Sequence[int], dim: int, p: Tensor
    ) -> dict[str, Any]:
        """Zero state of ``shape``: of ``p``, [trained, other], or [other, trained] if dim is 1."""
        dtype, device = options.state_dtype(group, shape, p.dtype, dim), p.device
        # A float64 count is exact up to 2^53 steps, and torch counts on the host too.
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float64)}
        for name in self._names(group):
            state[name] = torch.zeros(shape, dtype=dtype, device=device)
            if dtype == torch.uint8:
                blocks = scales_shape(shape, dim)
                state[scales_of(name)] = torch.zeros(blocks, dtype=torch.float32, device=device)
        if group["rounding"] == "remainder" and p.dtype in COMPENSATIONS:
            rest = COMPENSATIONS[p.dtype]
            state["compensation"] = torch.zeros(shape, dtype=rest, device=device)
        if group["track_importance"]:
            units = shape[dim] if shape else 1
            for name in ("importance_signed", "importance_squared"):
                state[name] = torch.zeros(units, dtype=torch.float64, device=device)
        return state

    def state_bytes(self) -> int:
        """Bytes of state once every parameter has had a gradient; of all ranks together."""
        total = 0
        for _, group, p, index, dim in self.entries():
            shape = checkpoint.trained_shape(p, index, dim)
            like = torch.empty((), dtype=p.dtype, device="meta")  # where state has no memory
            state = self._new_state(group, shape, dim if isinstance(dim, int) else dim[-1], like)
            total += sum(value.nbytes for name, value in state.items() if name != "step")
        return total

    def _calls(self, entries: Iterable[Entry]) -> list[tuple[dict[str, Any], Call]]:
        """The work of one update: those of ``entries`` with a gradient, in few calls."""
        calls: dict[tuple[Any, ...], tuple[dict[str, Any], Call]] = {}
        # All state of one call has one dtype. Of SGD without momentum there is none.
        names = {id(group): (*self._names(group), "step")[0] for group in self.param_groups}
        counts: dict[int, float] = {}  # of each tensor of steps, which parameters share
        sharding, states = may_be_sharded(), self.state
        by_id = {id(p): state for p, state in states.items()}  # to hash a tensor takes long
        last: tuple[Any, ...] | None = None
        for number, group, p, index, dim in entries:
            if (grad := p.grad) is None:
                continue
            if grad.is_sparse:
                raise TypeError("a gradient is sparse; it must be dense")
            cut = self._cut(p, index, dim) if sharding or not isinstance(dim, int) else None
            state = by_id.get(id(p))
            if not state:
                state = states[p]
                state.update(self._first_state(group, p, index, dim, cut))
            step, of_group = state["step"], id(group)
            if (count := counts.get(id(step))) is None:
                count = counts[id(step)] = count_of(step)
            # A parameter that joined late, or had no gradient in a step, has a count of its own. A
            # rank may hold nothing of a sharded one, whose steps count all the same.
            here = cut is None or cut.here
            kind = getattr(state.get(names[of_group]), "dtype", None)
            key = (of_group, p.dtype, grad.dtype, p.device, count, kind, here)
            if key != last:
                if key not in calls:
                    # Noise depends on the position in a call, which starts anew on every rank.
                    calls[key] = group, Call(number + (first_row(p) << 32))
                call, last = calls[key][1], key
            call.counted.append(state)
            if cut is None:
                call.pieces.append((p, grad, index, dim, state))  # type: ignore[arg-type]
            else:
                call.add_cut(p, grad, cut, state)
        return [(group, call.closed()) for group, call in calls.values()]

    def _cut(self, p: Tensor, index: Tensor | None, dim: Dim) -> Cut | None:
        """What of ``p`` this rank updates, found once, as that waits; None: all, in one piece."""
        if isinstance(dim, int) and not is_sharded(p):
            return None
        known = self._cuts.get(p)
        if known is None or not known.is_of(p, index):
            known = self._cuts[p] = Cut(p, index, dim)
        return known

    def _first_state(
        self, group: dict[str, Any], p: Tensor, index: Tensor | None, dim: Dim, cut: Cut | None
    ) -> dict[str, Any]:
        if cut is not None:
            return self._new_state(group, cut.whole, cut.parts[0].dim, local(p))
        assert isinstance(dim, int)
        return self._new_state(group, Part(index, dim).shape(p), dim, p)

    def _clip_coefs(self, calls: list[tuple[dict[str, Any], Call]]) -> list[Tensor | None]:
        """Per call, the factor that brings the norm of all gradients to at most max_norm."""
        total: Tensor | None = None
        scale = self._of_scaler("grad_scale")
        for group, call in calls:
            if group["max_norm"] is not None:
                norm = ops.masked_grad_norm(call.grads, call.indices, call.dims, scale)
                total = norm if total is None else total.to(norm.device).hypot(norm)
        return [
            (group["max_norm"] / (total.to(call.params[0].device) + 1e-6)).clamp(max=1)
            if group["max_norm"] is not None and total is not None
            else None
            for group, call in calls
        ]

    def _update(self, group: dict[str, Any], call: Call, scalars: Scalars) -> None:
        """Call the operator."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_entries(self.entries())
        return loss

    @torch.no_grad()
    def update_entries(self, entries: Iterable[Entry]) -> None:
        """A step of some parameters: those of ``entries``, of :meth:`entries`, with a gradient."""
        # A schedule may have changed the rate since it was checked.
        for group in self.param_groups:
            options.check_lr(group["lr"])
        calls, scale = self._calls(entries), self._of_scaler("grad_scale")
        for (group, call), clip_coef in zip(calls, self._clip_coefs(calls), strict=True):
            if call.params:
                self._update(group, call, call.scalars(group, clip_coef, scale))
            call.count(self._of_scaler("found_inf"))

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

    # --------------------------------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """As every optimiser's. State of a sharded parameter is a DTensor of its whole shape, zero
        where nothing trains, so that a checkpoint can be read by any number of ranks."""
        result = super().state_dict()
        checkpoint.part_steps_(result)
        checkpoint.expand_state_(self, result)
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Options that a checkpoint's groups lack (another optimiser's, an earlier release's) are
        those that this one was made with."""
        super().__setstate__(state)
        self._cuts = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own, which no group of ours has
                    group.setdefault(name, value)
            if group["rounding"] == "kahan":  # of an earlier release
                group["rounding"] = "remainder"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: options, step counts (which the rounding noise follows) and state, in the dtype
        that the state was saved in.

        Raises:
            ValueError: the checkpoint is of other parameters, or trains other entries of them, or
                was written by an optimiser that computes something else (``amsgrad``).
        """
        checkpoint.check_same_update(self, state_dict)
        current = checkpoint.entries_of(self)
        checkpoint.check_same_entries(current, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        # torch takes the saved groups' tensors, which may lie on another device: ours go on.
        for group, (indices, dims) in zip(self.param_groups, current, strict=True):
            group["indices"], group["dims"] = indices, dims
        # torch casts state to the dtype of the parameter: it is put back as it was saved.
        checkpoint.restore_state_(self, state_dict)
