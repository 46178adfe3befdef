"""The plan of a call of ``attribute``: what it scores on what, checked, the same on every rank."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ssah.attribution.batches import counted_tokens
from ssah.attribution.forward_backward import check_sharded
from ssah.attribution.result import GRADIENT_METRICS, METRICS, TOKENS
from ssah.attribution.scores import check_option
from ssah.distributed import Ranks
from ssah.models import cheap_weights_hash, check_backbone
from ssah.units import DepthTwoModule, config_hash, find_modules

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What is scored, and on what. All but the batches is the same on every rank.

    Attributes:
        model: the model.
        modules: B's name -> module.
        kinds, metric, tokens, all_experts: as `attribute` takes them, ``tokens`` resolved.
        ranks: those that score together.
        sharded: whether they hold shards of the model's weights.
        weights_hash: of the weights; None where it would have to be computed.
        config_hash: of the model's configuration.
        batches: of this rank's loader.
        n_expected: how many they are, if the loader knows.
        fingerprint: of the data, if every rank's loader has the same one.
    """

    model: PreTrainedModel
    modules: dict[str, DepthTwoModule]
    kinds: tuple[str, ...]
    metric: str
    tokens: str
    all_experts: bool
    ranks: Ranks
    sharded: bool
    weights_hash: str | None
    config_hash: str
    batches: Iterator[Mapping[str, Any]]
    n_expected: int | None
    fingerprint: str | None

    @property
    def gradient(self) -> bool:
        """Whether the metric needs gradients of activations."""
        return self.metric in GRADIENT_METRICS


def make_plan(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    ranks: Ranks,
    metric: str,
    kinds: tuple[str, ...],
    tokens: str,
    all_experts: bool,
    resumes: bool,
) -> Plan:
    """Check a call on this rank, and that the other ranks were called alike."""
    with ranks.agreeing():
        check_option("metric", metric, METRICS)
        check_option("tokens", tokens, TOKENS)
        found = find_modules(model, kinds)
        assert isinstance(model, PreTrainedModel)
        over = Ranks.over(model)
        _check_metric(model, found, metric, all_experts)
        if over is None:
            check_backbone(model)
        else:
            check_sharded(model, found, ranks, over)
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"loader is {type(loader).__name__}, must yield batches, as a DataLoader does"
            )
        n_expected = operator.length_hint(loader, 0) or None  # before the first is taken
        batches = iter(loader)
        begun = list(islice(batches, 1))
        if tokens == "auto" and begun:
            tokens = counted_tokens(begun[0])
        hashed = cheap_weights_hash(model)
    facts = ranks.common(
        metric=metric,
        # A rank without a batch cannot tell what "auto" means: the others do.
        tokens=None if tokens == "auto" else tokens,
        modules=len(found),
        all_experts=all_experts,
        config_hash=config_hash(model),
        resume_dir=resumes,
        weights_hash=hashed,  # ranks that hold different weights would score no model at all
    )
    fingerprints = set(ranks.tell(getattr(loader, "fingerprint", None)))
    return Plan(
        model=model,
        modules=found,
        kinds=kinds,
        metric=metric,
        tokens=facts["tokens"] or tokens,
        all_experts=all_experts,
        ranks=ranks,
        sharded=over is not None,
        weights_hash=facts["weights_hash"],
        config_hash=facts["config_hash"],
        batches=chain(begun, batches),
        n_expected=n_expected,
        fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
    )


def _check_metric(
    model: PreTrainedModel, modules: Mapping[str, DepthTwoModule], metric: str, all_experts: bool
) -> None:
    """Raise ValueError where the model cannot give what the metric needs."""
    gradient = metric in GRADIENT_METRICS
    if gradient and model.get_output_embeddings() is None:
        raise ValueError(
            f"metric is {metric!r}, which needs a loss, but {type(model).__name__} has no "
            "vocabulary projection; load it with AutoModelForCausalLM"
        )
    if all_experts and (gradient or not any(module.routed for module in modules.values())):
        where = f"for the metric {metric!r}" if gradient else "for a model without routed experts"
        raise ValueError(f"all_experts is True, must be False {where}")
