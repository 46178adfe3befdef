"""The plan of a training run: which entries of a model train, and proof that the others do not."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.distributed import Ranks, reshard
from ssah.interventions import check_not_ablated
from ssah.models import cheap_weights_hash, check_idle, digests
from ssah.training import masked_ffn
from ssah.training import saving as updates
from ssah.training import sharded as sharded_plan
from ssah.training.checks import check_finite_weights, check_projections, check_trainable
from ssah.training.entries import canonical_names, fingerprint, select_entries, split
from ssah.training.masked_linear import MaskedProjection, pickling_error
from ssah.training.optimizer import (
    ACTIVE,
    PlanAdamW,
    UnitImportance,
    param_groups,
    unit_importance,
    watch_optimizers,
)
from ssah.training.saving import PLAN, plan_of
from ssah.units import DepthTwoModule, UnitSet, check_units, find_modules, model_name, units_hash

__all__ = ["UpdatePlan"]


class UpdatePlan:
    """Which entries of a model train, in force until it is closed. Made by `freeze`/`train_only`.

    While it is in force ``model.named_parameters()`` holds a compact parameter for every slice
    that trains (``<weight>_trained``), so that gradients and optimiser state exist for nothing
    else. ``state_dict``, ``load_state_dict`` and ``save_pretrained`` keep names, shapes and order;
    they copy what is split. FFN channels are permuted inside, which changes sums by rounding.
    A copy of the model (``copy.deepcopy``) carries a plan of its own, see `plan_of`.

    A model that ``fully_shard`` has sharded keeps its parameters, with dense gradients, and only
    the plan's own optimiser may train it.

    Attributes:
        model: the model.
        units: the units given, frozen or trained.
        trained_units: the units that train, over every module of the model.
        modules: its depth-2 modules by B's name.
        weights_hash: of the model as it was given (`ssah.models.weights`); None if sharded.
        fingerprint: SHA-256 (hex) of configuration and trained entries, equal for equal plans.
        ranks: those that the model is sharded over, or None.
    """

    def __init__(
        self, model: PreTrainedModel, units: UnitSet, *, keep: bool, also: Collection[str] = ()
    ) -> None:
        if not isinstance(units, UnitSet):
            raise TypeError(
                f"units is {type(units).__name__}; it must be a UnitSet, e.g. groups['scu']"
            )
        if plan_of(model) is not None:
            raise ValueError("model has an active plan already: close it first (plan.close())")
        self.modules: dict[str, DepthTwoModule] = find_modules(model)
        self.ranks = Ranks.over(model)
        check_units(model, units)
        check_idle(model, "before a plan is made")
        check_not_ablated(model, "before a plan is made")
        check_trainable(model)
        check_projections(model, self.modules, units.keys())
        with (self.ranks or Ranks()).agreeing():
            check_finite_weights(model, self.modules)
        self.model, self.units, self.keep = model, units, keep
        masks = {name: ~units.mask(name) if keep else units.mask(name) for name in units}
        self.trained_units = UnitSet(
            {name: masks[name].nonzero()[:, 0] for name in masks}
            | (
                {n: range(m.n_units) for n, m in self.modules.items() if n not in masks}
                if keep
                else {}
            ),
            {name: module.n_units for name, module in self.modules.items()},
        )
        self.entries = select_entries(
            model, self.modules, masks, rest=keep, also=canonical_names(model, also)
        )
        if not any(bool(e.trains.any()) for e in self.entries.values()):
            raise ValueError(
                f"units ({len(units)} of {sum(units.sizes.values())}) leave nothing to train; give "
                "units that own something, or name parameters in also="
            )
        self.units_hash, self.base_name = units_hash(model), model_name(model)
        self.weights_hash = cheap_weights_hash(model)
        self.fingerprint = fingerprint(self.units_hash, self.entries)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.last_optimizer: Callable[[], Any] | None = None
        self.masked: dict[str, MaskedProjection] = {}
        self.ffns: list[nn.Module] = []
        self.hooks: list[Any] = []
        gradients = {name: p.grad for name, p in model.named_parameters()}
        try:
            self._install(masks)
        except BaseException:  # out of memory, for one: the model is as it was
            self._uninstall()
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
            raise

    def _install(self, masks: Mapping[str, Tensor]) -> None:
        """Change the model. ``masks``: B's name -> bool [n_units], what trains."""
        for name, parameter in self.model.named_parameters():
            # A gradient left over would let an optimiser move what is frozen.
            parameter.grad = None
            parameter.requires_grad_(bool(self.entries[name].trains.any()))
        if self.ranks is None:
            split(self.model, self.modules, masks, self.entries, self.masked)
            self.ffns = masked_ffn.install(self.model, self.modules)
        else:
            self.hooks = sharded_plan.clear_frozen_gradients(self.model, self.entries)
        self.digests = self._digests()
        self.model.__dict__[PLAN] = self
        watch_optimizers(self)

    def _uninstall(self) -> None:
        """An ordinary model again, without gradients."""
        masked_ffn.uninstall(self.ffns)
        for module in self.masked.values():
            module.uninstall()
        for hook in self.hooks:
            hook.remove()
        for name, parameter in self.model.named_parameters():
            if name in self.required_grad:  # what was added since (adapters, say) is left alone
                parameter.grad = None
                parameter.requires_grad_(self.required_grad[name])
        self.model.__dict__.pop(PLAN, None)
        ACTIVE.discard(self)
        self.masked = {}

    # ---------------------------------------------------------------------------- what trains

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train, as in ``model.named_parameters()``."""
        self._check_open()
        return ((n, p) for n, p in self.model.named_parameters() if self._trains(n))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: for any optimiser of torch."""
        return (parameter for _, parameter in self.named_parameters())

    def original_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the whole model as they were before the plan, in their order.

        For whoever reads weights by name: a weight sync to another engine, an average of weights.
        What is split is put together anew, one parameter at a time: a copy, without a gradient,
        that no write reaches. Everything else is the model's own parameter.
        """
        self._check_open()
        for name in self.entries:
            owner, _, leaf = name.rpartition(".")
            module = self.masked.get(owner)
            if module is not None and leaf in module.slots:
                module.sync()
                yield name, module.slots[leaf].read()
            else:
                yield name, self.model.get_parameter(name)

    def _trains(self, name: str) -> bool:
        return name not in self.entries or bool(self.entries[name].trains.any())

    def trained_slices(self) -> Iterator[tuple[str, nn.Parameter, Tensor, int]]:
        """Every parameter that trains, as (original name, parameter, entries, number of entries).

        The entries, int64, are those of the original parameter that the rows of this one are;
        of a parameter that is not split, those that train, along the dimension that units own.
        """
        for name, entries in self.entries.items():
            size = len(entries.trains)
            owner, _, leaf = name.rpartition(".")
            module = self.masked.get(owner)
            if module is not None and leaf in module.slots:
                slot = module.slots[leaf]
                counts = [len(module._parameters[n]) for n in slot.names]  # type: ignore[arg-type]
                pieces = slot.trained_index().split(counts)
                for own, piece in zip(slot.names, pieces, strict=True):
                    parameter = module._parameters[own]
                    assert parameter is not None
                    yield name, parameter, piece, size
            elif entries.trains.any():
                yield name, self.model.get_parameter(name), entries.trains.nonzero()[:, 0], size

    def replaced(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and original parameters of what is split: no optimiser may hold them now."""
        for owner, module in self.masked.items():
            for leaf, slot in module.slots.items():
                yield f"{owner}.{leaf}", slot.original

    def print_trainable_parameters(self) -> None:
        """Print how many elements train, of how many, in PEFT's form."""
        dense = self.ranks is not None
        trained = sum(
            p.numel() * len(index) // size if dense else p.numel()
            for _, p, index, size in self.trained_slices()
        )
        print(
            f"trainable params: {trained:,d} || all params: {self.n_parameters:,d} || "
            f"trainable%: {100 * trained / self.n_parameters:.4f}"
        )

    # ------------------------------------------------------------------------------ optimiser

    def param_groups(self, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Parameter groups for any optimiser: norms and biases (one dimension) do not decay."""
        self._check_open()
        return param_groups(self, weight_decay)

    def optimizer(
        self, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.01, **options: Any
    ) -> PlanAdamW:
        """AdamW over what trains.

        Args:
            lr: learning rate.
            weight_decay: decoupled; not of norms and biases.
            **options: of :class:`ssah_kernels.optim.MaskedAdamW`: betas, eps, state_dtype,
                rounding, seed, max_norm, track_importance. ``rounding`` is ``"stochastic"`` where
                a bfloat16 weight trains: to nearest, most steps of 1e-5 would change nothing.
        """
        options = self._rounding() | options
        optimizer = PlanAdamW(self.param_groups(weight_decay), lr=lr, **options)
        self.last_optimizer = weakref.ref(optimizer)
        return optimizer

    def optimizer_cls_and_kwargs(
        self, args: Any, **options: Any
    ) -> tuple[type[PlanAdamW], dict[str, Any]]:
        """For ``transformers.Trainer`` and TRL's: ``optimizer_cls_and_kwargs=``.

        Args:
            args: the ``TrainingArguments``: learning rate, betas, epsilon and decay are taken
                from it. Clipping stays with the trainer (``max_grad_norm``).
            **options: further ones of :class:`ssah_kernels.optim.MaskedAdamW`; ``rounding`` as in
                :meth:`optimizer`.
        """
        return PlanAdamW, {
            "params": self.param_groups(args.weight_decay),
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            **self._rounding(),
            **options,
        }

    def _rounding(self) -> dict[str, str]:
        """How weights are stored unless the caller says so.

        bfloat16 has 8 bits: a step of less than a 512th of a weight is lost to nearest. float16
        parameters know no stochastic rounding.
        """
        dtypes = {p.dtype for p in self.parameters()}
        stochastic = torch.bfloat16 in dtypes and torch.float16 not in dtypes
        return {"rounding": "stochastic"} if stochastic else {}

    def importance(self, optimizer: Any = None) -> UnitImportance:
        """Importance of the trained units, accumulated inside the updates so far.

        Args:
            optimizer: by default the last one that stepped under this plan.

        Raises:
            RuntimeError: there is none, or it was made without ``track_importance=True``.
        """
        self._check_open()
        if optimizer is None and self.last_optimizer is not None:
            optimizer = self.last_optimizer()
        if optimizer is None:
            raise RuntimeError("no optimiser has stepped under this plan; pass optimizer=")
        return unit_importance(self, optimizer)

    # --------------------------------------------------------------------- frozen means frozen

    def verify(self) -> None:
        """Compare what is frozen with the hashes taken at the start.

        Of a sharded model every rank looks at its own rows, and all have to call this.

        Raises:
            RuntimeError: a frozen weight changed, if only by a bit; it is named. On every rank.
        """
        self._check_open()
        with (self.ranks or Ranks()).agreeing():
            self._verify()

    def _verify(self) -> None:
        now = self._digests()
        moved = [name for name, value in self.digests.items() if now[name] != value]
        if moved:
            more = f" and {len(moved) - 5} more" if len(moved) > 5 else ""
            raise RuntimeError(
                f"frozen entries of {', '.join(moved[:5])}{more} are not what they were when the "
                "plan was made (weights loaded from elsewhere, another dtype, or written to)"
            )

    def _digests(self) -> dict[str, str]:
        if self.ranks is not None:
            return digests(sharded_plan.frozen_pieces(self.model, self.entries))
        pieces: dict[str, Callable[[], Iterable[Tensor]]] = {}
        for name, entries in self.entries.items():
            if entries.whole:
                continue
            owner, _, leaf = name.rpartition(".")
            module = self.masked.get(owner)
            if module is not None and leaf in module.slots:
                pieces[name] = module.slots[leaf].frozen_rows
            else:
                parameter = self.model.get_parameter(name)
                pieces[name] = lambda p=parameter: (p,)  # type: ignore[misc]
        return digests(pieces)

    # --------------------------------------------------------------------------------- saving

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the trained slices alone: safetensors, and JSON that says what they belong to.

        Raises:
            ValueError: the model is sharded: its checkpoints are torch.distributed.checkpoint's.
        """
        self._check_open()
        updates.save_update(self, directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes; see `ssah.training.saving.push_update`."""
        self._check_open()
        return updates.push_update(self, repo_id, **options)

    # -------------------------------------------------------------------------------- closing

    def close(self) -> None:
        """An ordinary model again: original parameters, names, order and ``requires_grad``.

        The trained values are kept, bit for bit. Closing twice does nothing.
        """
        if self.closed:
            return
        self._check_open()
        self._uninstall()

    @property
    def closed(self) -> bool:
        """Whether the plan is no longer in force."""
        return plan_of(self.model) is not self

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the plan is closed: make a new one")
        if self.ranks is not None:
            reshard(self.model)

    def __enter__(self) -> UpdatePlan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> UpdatePlan:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy({**self.__dict__, "last_optimizer": None}, memo))
        watch_optimizers(new)
        return new

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise pickling_error()
