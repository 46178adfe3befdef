"""The plan of a training run: which entries of a model train, and proof that the others do not.

Example: of an FFN with four units, units 1 and 3 train. Before the plan and under it,
``model.named_parameters()`` has

    gate_proj.weight  [4, hidden]      gate_proj.weight_trained  [2, hidden]
    up_proj.weight    [4, hidden]      up_proj.weight_trained    [2, hidden]
    down_proj.weight  [hidden, 4]      down_proj.weight_trained  [2, hidden]

The values of the frozen units are in no parameter, so that no optimiser can move them, whatever its
weight decay and its momentum; hashes of them, taken as the plan is made, prove it (`verify`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.distributed import Ranks, reshard
from ssah.models import cheap_weights_hash
from ssah.moved import renamed
from ssah.selections import Selection
from ssah.training.checks import check_planable
from ssah.training.choice import Beside, Rows, choose
from ssah.training.entries import fingerprint
from ssah.training.installing import (
    Installed,
    OriginalValues,
    Reversible,
    check_alike,
    check_in_place,
    check_unmoved,
    follow,
    whole_digests,
)
from ssah.training.optimising import ACTIVE, PLAN, Optimised, retire, watch_optimizers
from ssah.training.splitting import pickling_error
from ssah.training.updates import push_update, save_update
from ssah.units import UnitSet, model_name, units_hash


def plan_of(model: nn.Module) -> UpdatePlan | None:
    """The plan that is in force on ``model``, or None."""
    return vars(model).get(PLAN)


class UpdatePlan(Optimised, Reversible):
    """Which entries of a model train, in force until it is closed. Made by `freeze`/`train_only`.

    While it is in force ``model.named_parameters()`` holds a compact parameter for every slice
    that trains (``<weight>_trained``), so that gradients and optimiser state exist for nothing
    else. ``state_dict``, ``load_state_dict`` and ``save_pretrained`` keep names, shapes and order;
    they copy what is split, into host memory. FFN channels are permuted inside, which changes sums
    by rounding. A copy of the model (``copy.deepcopy``) carries a plan of its own, see `plan_of`. A
    model that ``fully_shard`` has sharded keeps its parameters, with dense gradients, and only the
    plan's own optimiser may train it.

    Attributes:
        model: the model.
        units: the units given, frozen or trained; of a selection, those whose columns of B it has.
        selection: the selection given, or None where units were.
        keep: whether they are frozen (`freeze`) or trained (`train_only`).
        trained_units: the units that train, over every module of the model.
        modules: its depth-2 modules by B's name.
        weights_hash: of the model as it was given (`ssah.models.weights`); None if sharded.
        fingerprint: SHA-256 (hex) of configuration and trained entries, equal for equal plans.
        masked: name -> projection of which some entries train and some do not.
    """

    @renamed(also="extra_parameters")
    def __init__(
        self,
        model: PreTrainedModel,
        units: UnitSet | Selection,
        *,
        keep: bool,
        extra_parameters: Collection[str] = (),
        kept_parameters: Collection[str] = (),
        rows: Rows | None = None,
        unfreeze: bool = False,
    ) -> None:
        self.modules, ranks = check_planable(model, units), Ranks.over(model)
        self.model, self.keep = model, keep
        self.selection = units if isinstance(units, Selection) else None
        beside = Beside(extra_parameters, kept_parameters, rows, unfreeze)
        choice = choose(model, self.modules, units, beside, keep=keep)
        self.units, self.trained_units = choice.units, choice.trained_units
        self.entries = choice.entries
        # Taken now: afterwards names and shapes of the model's parameters are others.
        self.units_hash, self.base_name = units_hash(model), model_name(model)
        self.weights_hash = cheap_weights_hash(model)
        self.fingerprint = fingerprint(self.units_hash, self.entries)
        if ranks is not None:
            check_alike(ranks, self.fingerprint, self.entries)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self._installed = Installed(model, self.entries, self.fingerprint, ranks)
        self.masked = self._installed.masked
        self._originals = OriginalValues(self._installed, self.weights_hash)
        self._installed.install(self.modules, choice.masks)
        model.__dict__[PLAN] = self
        watch_optimizers(self._installed)

    @property
    def ranks(self) -> Ranks | None:
        """Those that the model is sharded over; None: it is in one memory."""
        return self._installed.ranks

    @property
    def digests(self) -> dict[str, str]:
        """Parameter -> hash of its frozen entries, taken at the start; if sharded, of this rank."""
        return self._installed.frozen

    # ---------------------------------------------------------------------------- what trains

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train, as in ``model.named_parameters()``; of what is split a
        slice ``[trained, ...]``, unit by unit: of B's weight ``[out, units]`` it is a transpose."""
        self._check_open()
        return self._installed.parameters()

    def original_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the whole model as they were before the plan, in their order.

        For whoever reads weights by name: a weight sync to another engine, an average of weights.
        What is split is put together anew, one at a time, e.g. ``[out, units]``: a copy, without a
        gradient, that no write reaches. Everything else is the model's own parameter.
        """
        self._check_open()
        yield from self._installed.originals()

    def trained_slices(self) -> Iterator[tuple[str, nn.Parameter, Tensor, int]]:
        """Every parameter that trains, as (original name, parameter, entries, number of entries).

        A slice ``[trained, ...]`` has one row for each of its entries, int64 ``[trained]``, of the
        original; of a parameter that is not split, they are those that train.
        """
        slices = self._installed.slices()
        return ((s.name, s.parameter, s.index, len(s.entries.trains)) for s in slices)

    def replaced(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and originals of what is split, empty ``[0]``: no optimiser may hold them now."""
        return self._installed.replaced()

    def print_trainable_parameters(self) -> None:
        """Print how many elements train, of how many, in PEFT's form."""
        trained = self._installed.n_trained()
        print(
            f"trainable params: {trained:,d} || all params: {self.n_parameters:,d} || "
            f"trainable%: {100 * trained / self.n_parameters:.4f}"
        )

    # --------------------------------------------------------------------- frozen means frozen

    def verify(self) -> None:
        """Compare what is frozen with the hashes taken at the start.

        Of a sharded model every rank looks at its own rows, and all have to call this.

        Raises:
            RuntimeError: a frozen weight changed, if only by a bit, or is not where it was, or an
                adapter or a patch adds to what it computes; it is named. On every rank.
        """
        self._check_open()
        with (self.ranks or Ranks()).agreeing():
            check_in_place(self._installed)
            check_unmoved(self.digests, self._installed.digests())

    # --------------------------------------------------------------------------------- saving

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the trained slices alone: safetensors, and JSON that says what they belong to.

        Of a sharded model every rank has to call this, and the first one writes.
        """
        about = self._about()
        ranks = self.ranks or Ranks()
        if self.ranks is not None:
            about["frozen"] = whole_digests(self.model, self.entries, ranks)
        save_update(self._installed.slices(), about, directory, ranks)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes, with a card.

        Args:
            repo_id: ``"user/name"``; created if it does not exist.
            options: ``figures``, ``data``, ``private``, ``token`` and ``commit_message``; see
                `ssah.training.updates.push_update`.

        Raises:
            ValueError: the model is sharded: save the update, and upload that; a figure has no
                interval.
        """
        self._check_open()
        if self.ranks is not None:
            raise ValueError(
                f"model is sharded over {self.ranks.size} ranks, must be in one memory for an "
                "update to be uploaded: call save_pretrained on every rank, and upload its folder"
            )
        return push_update(self._installed.slices(), self._about(), repo_id, **options)

    def _about(self) -> dict[str, Any]:
        """What is written beside the slices: the plan, and what it kept frozen."""
        self._check_open()
        self._originals.check_trained()
        return {
            "base_model": self.base_name,
            "units_hash": self.units_hash,
            "weights_hash": self.weights_hash,
            "fingerprint": self.fingerprint,
            "keep": self.keep,
            "frozen": self.digests,
        }

    # -------------------------------------------------------------------------------- closing

    def close(self) -> None:
        """An ordinary model again: original parameters, names, order and ``requires_grad``.

        The trained values are kept, bit for bit. Closing twice does nothing.
        """
        if self.closed:
            return
        self._originals.check_trained()
        self._check_open()
        slices = self._installed.own_slices()
        self._installed.uninstall()
        self.model.__dict__.pop(PLAN, None)
        ACTIVE.discard(self._installed)
        retire(slices)

    @property
    def closed(self) -> bool:
        """Whether the plan is no longer in force."""
        return plan_of(self.model) is not self

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the plan is closed: make a new one")
        follow(self._installed)
        if self.ranks is not None:
            reshard(self.model)

    def __enter__(self) -> UpdatePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> UpdatePlan:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._installed.forget()
        watch_optimizers(new._installed)
        return new

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise pickling_error()
