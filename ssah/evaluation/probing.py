"""Which way a model reasons: are its hidden states nearer to a refusal's or to a compliance's?

Each request is given in three versions: alone, followed by the start of a refusal, and followed by
the start of a compliance. The model goes on with each of them greedily, and what it computes
meanwhile is compared. Only distances are kept, never what was generated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssah.data import IGNORE_INDEX, check_count
from ssah.evaluation.generating import (
    Finite,
    check_list,
    greedy,
    left_padded,
    longest_first,
    stop_tokens,
)
from ssah.evaluation.intervals import bootstrap
from ssah.evaluation.measures import COMPLIANCE, REFUSAL, opened
from ssah.models import as_it_was, cheap_weights_hash, check_whole
from ssah.storage import FORMAT, TEXT, Fields, Stored, save_tensors
from ssah.units import model_name, units_hash
from ssah.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Probe", "probe"]

_CONTENT = "ssah probe"
_FIELDS: Fields = {
    "model_name": str,
    "units_hash": TEXT,
    "weights_hash": TEXT,
    "refusal_opening": str,
    "compliance_opening": str,
    "version": str,
}
# Those of a probe, by the names of its fields.
_TENSORS = ("refusal_distances", "compliance_distances", "baselines")


@dataclass(frozen=True, eq=False)
class Probe:
    """Distances of the continued versions to the plain requests, per layer.

    Layer 0 holds the embeddings, layer l the output of block l; the last one is taken after the
    final norm, as transformers gives it.

    Attributes:
        refusal_distances, compliance_distances: float64 ``[requests, tokens, layers + 1]``, cosine
            distances in [0, 2] over the first 1, 2, ... generated tokens.
        baselines: float64 ``[tokens, layers + 1]``, the mean distance of two plain requests.
        metadata: ``model_name``, ``units_hash``, ``weights_hash``, the openings ``refusal_opening``
            and ``compliance_opening``, and ``version`` of this package.
    """

    refusal_distances: Tensor
    compliance_distances: Tensor
    baselines: Tensor
    metadata: Mapping[str, Any]

    @cached_property
    def refusal(self) -> Tensor:
        """Mean distance to the refusing version less the baseline, over all tokens.

        float64 ``[layers + 1]``. Below 0: nearer than another plain request is.
        """
        return self.refusal_distances[:, -1].mean(0) - self.baselines[-1]

    @cached_property
    def compliance(self) -> Tensor:
        """The same to the complying version, float64 ``[layers + 1]``."""
        return self.compliance_distances[:, -1].mean(0) - self.baselines[-1]

    @cached_property
    def difference(self) -> Tensor:
        """``compliance - refusal``, float64 ``[layers + 1]``. Positive: nearer to the refusal."""
        return self.differences[:, -1].mean(0)

    @cached_property
    def differences(self) -> Tensor:
        """Per request and number of tokens, float64 ``[requests, tokens, layers + 1]``.

        The baseline is not in them: it cancels.
        """
        return self.compliance_distances - self.refusal_distances

    def intervals(self, values: Tensor, *, level: float = 0.95, seed: int = 0) -> Tensor:
        """Bootstrap intervals of the means over requests of ``[requests, columns]``.

        Requests are resampled; the baseline is taken as known.

        Returns:
            float64 ``[columns, 2]``: lower and upper bounds.
        """
        bounds = [bootstrap(column, level=level, seed=seed) for column in values.unbind(1)]
        return torch.tensor(bounds, dtype=torch.float64)

    def safe_from(self, *, level: float = 0.95, seed: int = 0) -> int | None:
        """The lowest layer from which on the model is nearer to the refusal, up to the last.

        Nearer: the interval of the difference lies above 0. None: the last layer's does not.
        """
        # [layers + 1]; the first layer after the last one whose interval reaches down to 0
        low = self.intervals(self.differences[:, -1], level=level, seed=seed)[:, 0]
        undecided = (low <= 0).nonzero()[:, 0]
        first = int(undecided[-1]) + 1 if len(undecided) else 0
        return first if first < len(low) else None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write to a folder: safetensors and JSON, no pickle. No text is in them."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        meta = {"content": _CONTENT, "format": FORMAT, **self.metadata}
        save_tensors(directory, tensors, meta)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Probe:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: something else was, or it is damaged; the file and the field are named.
        """
        stored = Stored(directory, _CONTENT, _FIELDS, {"units_hash": None, "weights_hash": None})
        refusal = stored.tensor("refusal_distances", shape=(None, None, None))
        shape = tuple(refusal.shape)
        compliance = stored.tensor("compliance_distances", shape=shape)
        baselines = stored.tensor("baselines", shape=shape[1:])
        return cls(refusal, compliance, baselines, {key: stored.meta[key] for key in _FIELDS})


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Iterable[str | Mapping[str, Any]],
    *,
    tokens: int = 10,
    refusal: str = REFUSAL,
    compliance: str = COMPLIANCE,
    batch_size: int = 8,
    max_length: int = 512,
    advance: Callable[[int], None] | None = None,
) -> Probe:
    """Cosine distance of hidden states between requests alone and requests with an opened answer.

    With h_v(l, t) the hidden state at layer l from which version v's generated token t is chosen
    (v: x alone, r with the refusal, c with the compliance), and m its mean over the first k tokens,

        m_v(l, k) = 1/k sum_{t <= k} h_v(l, t),        d_v(l, k) = 1 - cos(m_v(l, k), m_x(l, k)),

    the result has d_r and d_c of every request, and the baseline: the mean of
    1 - cos(m_x(l, k), m_y(l, k)) over all pairs of different requests x, y alone. Tokens are chosen
    greedily; the end of the turn may not be chosen, so that each version has just as many.

    Args:
        model: a causal language model of transformers; it is left as it was.
        tokenizer: the model's.
        queries: requests, at least two: strings, or rows as ``ssah.data.load_rows`` returns them.
        tokens: generated with each version, at least 1 (the paper: 2 to 10).
        refusal, compliance: the openings.
        batch_size: requests run at a time, those of similar length together.
        max_length: the most tokens of request and opening together.
        advance: called with the number of requests that are done.

    Raises:
        ValueError: an argument is out of range, or a request is too long.
        FloatingPointError: hidden states or logits are not finite.

    Source: Li & Kim, arXiv 2410.10862, figures 2 to 4.
    """
    check_whole(model)
    check_count("tokens", tokens)
    for name, text in (("refusal", refusal), ("compliance", compliance)):
        if not text.strip():
            raise ValueError(f"{name} is {text!r}, must be a non-empty string")
    check_list("queries", queries)
    asked = list(queries)
    if len(asked) < 2:
        raise ValueError(f"queries has {len(asked)} requests, must have at least 2: the baseline")
    refusing, complying = (
        opened(asked, opening, tokenizer, max_length=max_length, name="queries")
        for opening in (refusal, compliance)
    )
    # The request alone is what stands before the opening, up to its first label.
    plain = [example["input_ids"][: example["labels"].count(IGNORE_INDEX)] for example in refusing]
    versions = (plain, *([e["input_ids"] for e in each] for each in (refusing, complying)))

    chunks = longest_first([example["input_ids"] for example in complying], batch_size)
    distances: list[tuple[Tensor, Tensor]] = []
    sums = _Sums()
    stops = stop_tokens(model, tokenizer)
    with as_it_was(model), greedy(model, tokenizer, stops, tokens), torch.inference_mode():
        for chunk in chunks:
            states = [_means(model, [version[i] for i in chunk]) for version in versions]
            sums.add(states[0])
            refused, complied = (_distances(states[0], other) for other in states[1:])
            distances.append((refused, complied))
            if advance is not None:
                advance(sum(len(refused) for refused, _ in distances))
    # What was computed stands in the order of the batches; argsort is the way back.
    back = torch.tensor([i for chunk in chunks for i in chunk]).argsort()  # [requests]
    refused, complied = (torch.cat(each)[back] for each in zip(*distances, strict=True))
    return Probe(
        refusal_distances=refused,
        compliance_distances=complied,
        baselines=sums.baselines(),
        metadata={
            "model_name": model_name(model),
            "units_hash": units_hash(model),
            "weights_hash": cheap_weights_hash(model),
            "refusal_opening": refusal,
            "compliance_opening": compliance,
            "version": __version__,
        },
    )


def _means(model: PreTrainedModel, prompts: list[list[int]]) -> list[Tensor]:
    """Hidden states over the first 1, 2, ... generated tokens: per layer, [rows, tokens, hidden].

    Float64, on the CPU; layers may differ in their size (OPT projects the last one).
    """
    finite = Finite()
    found: Any = model.generate(  # type: ignore[operator]
        **left_padded(model, prompts),
        min_new_tokens=model.generation_config.max_new_tokens,  # the turn does not end
        output_hidden_states=True,
        return_dict_in_generate=True,
        logits_processor=[finite],
    )
    means: list[Tensor] = []
    for layer in zip(*found.hidden_states, strict=True):  # [tokens][layers] -> [layers][tokens]
        # One entry a generated token: [rows, width, hidden] at first, then [rows, 1, hidden]. The
        # last position is the one from which the next token is chosen.
        steps = torch.stack([step[:, -1] for step in layer], dim=1).cpu().double()
        if not bool(steps.isfinite().all()):
            raise FloatingPointError(f"hidden states of layer {len(means)} are NaN or infinite")
        # [rows, tokens, hidden] / [tokens, 1]: of the first k tokens, the sum divided by k
        means.append(steps.cumsum(1) / torch.arange(1, steps.shape[1] + 1)[:, None])
    finite.check()
    return means


def _distances(plain: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Cosine distances, [rows, tokens, layers + 1], of [rows, tokens, hidden] per layer."""
    return torch.stack(
        [1 - F.cosine_similarity(a, b, dim=-1) for a, b in zip(plain, other, strict=True)], dim=-1
    )


class _Sums:
    """Mean distance of all pairs, from sums alone: no state of a request is kept.

    Sum over pairs i != j of u_i . u_j = |sum of u|^2 - sum of |u|^2, u being of length 1. Of
    u = (1, 0), (0, 1), (1, 0) the sum is (2, 1): 4 + 1 - 3 = 2, and the one pair that is alike,
    counted in both orders, has 1 + 1 = 2. Divided by the 3 x 2 pairs: a mean cosine of 1/3.
    """

    def __init__(self) -> None:
        self.n = 0
        self.vectors: list[Tensor] = []  # per layer, [tokens, hidden]
        self.squares: list[Tensor] = []  # per layer, [tokens]

    def add(self, means: Sequence[Tensor]) -> None:  # per layer, [rows, tokens, hidden]
        units = [F.normalize(mean, dim=-1) for mean in means]  # per layer, [rows, tokens, hidden]
        if not self.n:
            self.vectors = [torch.zeros_like(unit[0]) for unit in units]
            self.squares = [torch.zeros_like(unit[0, :, 0]) for unit in units]
        self.n += len(units[0])
        for layer, unit in enumerate(units):
            self.vectors[layer] += unit.sum(0)
            self.squares[layer] += unit.square().sum((0, 2))

    def baselines(self) -> Tensor:
        """[tokens, layers + 1]"""
        pairs = self.n * (self.n - 1)
        together = zip(self.vectors, self.squares, strict=True)
        similar = [(total.square().sum(-1) - own) / pairs for total, own in together]
        return 1 - torch.stack(similar, dim=-1)
