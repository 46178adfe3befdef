"""An intervention: a model that runs with something changed, and is what it was after, bit for bit.

with intervene(model, Zero(groups["scu"]), Add(12, direction, at="generated")):
    ...                                  # columns of B are zero; layer 12 puts out h + direction

Weights are copied, changed, and put back from the copy. Hidden states are changed by hooks, which
are taken off. Nothing is computed from a changed weight to restore it, since (w * 2) / 2 need not
be w.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ssah.interventions.columns import Part, check_finite
from ssah.interventions.hidden import AtLayer, HiddenChange, plan_hidden
from ssah.interventions.positions import Passes
from ssah.interventions.weights import WeightChange, Writing, plan_weights
from ssah.models import check_idle

# The blocks that each module with changed weights is inside of, the innermost last: "ablate". Weak
# keys, and not an attribute of the module: a copy of the model made inside keeps its changed
# weights for good and is an ordinary model.
_INSIDE: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()
# The changes of what a module puts out, and of what it is given, the outermost block's first. One
# hook a module applies them: hooks of one's own for each block would run the innermost first.
_Changes: TypeAlias = weakref.WeakKeyDictionary[nn.Module, list[tuple[AtLayer, Passes]]]
_PUT_OUT: _Changes = weakref.WeakKeyDictionary()
_GIVEN: _Changes = weakref.WeakKeyDictionary()


def intervene(
    model: nn.Module, *changes: WeightChange | HiddenChange
) -> AbstractContextManager[nn.Module]:
    """Context manager: ``model`` runs with these changes inside, and is what it was after.

    Changes of weights (`Zero`, `Scale`, `Replace`) are applied in their order. So are changes of
    hidden states (`Add`, `ProjectOut`, `ScaleHidden`, `ReplaceHidden`), at their place in a layer.
    One object may be entered again, also inside itself. Blocks nest, as long as the last one
    entered is the first one left, which `with` ensures; an inner one changes what the outer ones
    have made. Everything is put back after an exception too.

    Inside a change of *weights*, what would make it permanent is refused: `freeze`, `train_only`,
    `prune` and `load_update`. A packed or offloaded weight is left alone, and channels are changed
    as they enter it, as in `ablate`.

    Args:
        model: a transformers model of a known family.
        changes: what is changed. Yields the model.

    Raises:
        TypeError: a change is of no such class, or holds something of another type.
        ValueError: a change does not fit the model: units or parameters that it lacks, layers that
            it lacks, values of another shape. Also as a pass runs that does not tell the positions
            or has not the rows that a change names.
        FloatingPointError: values, or weights that are to be changed, are NaN or infinite.

    Source: Arditi et al., arXiv 2406.11717 (projecting a direction out); Turner et al., arXiv
    2308.10248 (adding one).

    Example: ``with ssah.intervene(model, ProjectOut(range(32), direction)): model.generate(...)``
    """
    check_idle(model, "to be changed for a while")
    writings: list[Writing] = []
    at_layers: list[AtLayer] = []
    for change in changes:
        if isinstance(change, HiddenChange):
            at_layers += plan_hidden(model, change)
        elif isinstance(change, WeightChange):
            writings.append(plan_weights(model, change))
        else:
            raise TypeError(
                f"changes has a {type(change).__name__}; it must have Zero, Scale, Replace, Add, "
                "ProjectOut, ScaleHidden or ReplaceHidden of ssah.interventions"
            )
    return Intervention(model, "intervene", writings, at_layers)


class Intervention(AbstractContextManager[nn.Module]):
    """What `intervene` and `ablate` return: planned changes, to be entered any number of times."""

    def __init__(
        self,
        model: nn.Module,
        called: str,
        writings: Sequence[Writing],
        at_layers: Sequence[AtLayer] = (),
    ) -> None:
        """``called`` is the function that it came from, for messages."""
        self.model = model
        self._called = called
        self._writings = writings
        self._at_layers = at_layers
        self._entered: list[ExitStack] = []

    def __enter__(self) -> nn.Module:
        check_idle(self.model, "to be changed for a while")
        channels = [each for writing in self._writings for each in writing.channels]
        parts = [pair for writing in self._writings for pair in writing.parts]
        with ExitStack() as stack:
            owners = [part.owner for part, _ in parts] + [each.down for each in channels]
            stack.enter_context(marked(owners, self._called))
            for each in channels:
                stack.callback(each.down.register_forward_pre_hook(each.hook).remove)
            stack.enter_context(_hooked(self.model, self._at_layers))
            saved: list[tuple[Part, Tensor]] = []
            # Marks and hooks go after the weights: a model that cannot be put back is not inside.
            stack.callback(_put_back, saved)
            # It alone may write to inference tensors, and ordinary parameters still get their
            # version counted, so that a pending backward pass notices the change.
            with torch.inference_mode():
                # Everything is read, and may be refused, before anything is written.
                saved.extend((part, part.read()) for part, _ in parts)
                check_finite(saved)
                for _, change in parts:
                    change()
            self._entered.append(stack.pop_all())
        return self.model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.pop().close()


def check_not_ablated(model: nn.Module, purpose: str) -> None:
    """Refuse a model whose weights are changed for the while, by `ablate` or `intervene`.

    What is done to it now would see the changed weights, or keep them.

    Args:
        model: the model.
        purpose: what it was to be used for, e.g. ``"to be pruned"``.

    Raises:
        ValueError: it is inside such a block; a module is named.
    """
    for name, module in model.named_modules():
        if module in _INSIDE:
            raise ValueError(
                f"model is inside `with ssah.{_INSIDE[module][-1]}(...)`: weights of {name} are "
                f"changed for the while. It must be left {purpose}: do that after the `with` block"
            )


@contextmanager
def marked(owners: Sequence[nn.Module], called: str) -> Iterator[None]:
    """Inside, ``owners`` count as changed."""
    for owner in owners:
        _INSIDE.setdefault(owner, []).append(called)
    try:
        yield
    finally:
        for owner in owners:
            _INSIDE[owner].pop()
            if not _INSIDE[owner]:
                del _INSIDE[owner]


@contextmanager
def _hooked(model: nn.Module, at_layers: Sequence[AtLayer]) -> Iterator[None]:
    """Inside, layers put out changed hidden states."""
    if not at_layers:
        yield
        return
    passes = Passes(model)
    with ExitStack() as stack:
        hook = passes.decoder.register_forward_pre_hook(passes.hook, with_kwargs=True)
        stack.callback(hook.remove)
        for each in at_layers:
            before = each.change.site == "input"
            changes = (_GIVEN if before else _PUT_OUT).setdefault(each.module, [])
            if not changes:
                # First of all hooks, so that those which record hidden states record changed ones.
                add = (
                    each.module.register_forward_pre_hook(_take_in, prepend=True, with_kwargs=True)
                    if before
                    else each.module.register_forward_hook(_put_out, prepend=True)
                )
                stack.callback(add.remove)
            changes.append((each, passes))
            stack.callback(changes.pop)
        yield


def changes_some_positions(model: nn.Module) -> bool:
    """Whether hidden states are changed at some positions or rows alone, in blocks under way.

    A pass over a part of each row, or over one row in the place of several, then gives another
    result. For example, ``at="last"`` is the last token of a whole prompt. So a batch must be
    passed as it is, all prompts whole in one pass, and the same rows go on.
    """
    tables = (_PUT_OUT, _GIVEN)
    changes = (own for m in model.modules() for table in tables for own, _ in table.get(m, ()))
    return any(
        not isinstance(own.change.at, str)
        or own.change.at != "all"
        or own.rows is not None
        or (own.value is not None and own.value.dim() > 1)
        for own in changes
    )


def _put_out(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    """A module's output after all changes; some layers put out a tuple, hidden states first."""
    if isinstance(output, tuple):
        return (_changed(_PUT_OUT, module, output[0]), *output[1:])
    return _changed(_PUT_OUT, module, output)


def _take_in(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is given, after all changes."""
    if args:
        return (_changed(_GIVEN, layer, args[0]), *args[1:]), kwargs
    h = _changed(_GIVEN, layer, kwargs["hidden_states"])
    return args, {**kwargs, "hidden_states": h}


def _changed(table: _Changes, module: nn.Module, h: Tensor) -> Tensor:  # [rows, tokens, hidden]
    for change, passes in table.get(module, ()):  # none in a copy of the model made inside
        # A function that is asked about the prompts sees the model without changes.
        h = h if passes.asking else change(h, passes)
    return h


@torch.inference_mode()
def _put_back(saved: list[tuple[Part, Tensor]]) -> None:
    """Restores every part that can be, also where another one cannot."""
    failed: list[tuple[str, Exception]] = []
    for part, values in reversed(saved):
        try:
            part.write(values)
        except (RuntimeError, IndexError, AttributeError) as error:
            failed.append((part.param, error))
    if failed:
        raise RuntimeError(
            f"{len(failed)} weights could not be put back ({failed[0][0]} for one): they were "
            "replaced inside the `with` block. All others are back; load the model again"
        ) from failed[0][1]
