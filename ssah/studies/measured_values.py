"""What was measured of a model, as values that pair and as a summary: plain data in, no model.

For example, two rows have responses of 10 and 30 tokens, and of 5 and 45 nats. The loss is 50 / 40
= 1.25 nats per token. As values that pair they are 5 / 20 and 45 / 20, whose mean is 1.25 too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssah.evaluation import Divergence, bootstrap, rate


def losses_of(log_probs: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Losses as plain data: ``loss`` (nats per token), ``nats`` and ``tokens`` of each row.

    Args:
        log_probs: float64 ``[rows]``, summed over the response of each, in nats.
        tokens: int64 ``[rows]``, of each response.

    Raises:
        ValueError: no response has a token.
    """
    nats = -log_probs
    if not int(tokens.sum()):
        raise ValueError("the rows have no response token to predict, must have at least one")
    return {
        "loss": float(nats.sum() / tokens.sum()),
        "nats": nats.tolist(),
        "tokens": tokens.tolist(),
    }


def losses_beside(kl: Mapping[str, Any]) -> dict[str, Any]:
    """As `losses_of`, of rows whose KL was measured: the same pass has found both.

    Args:
        kl: the fields of a `Divergence` as lists, one value a row.
    """
    log_probs = torch.tensor(kl["log_prob"], dtype=torch.float64)  # [rows]
    return losses_of(log_probs, torch.tensor(kl["tokens"]))


def summary(
    measured: Mapping[str, Any], attack: Mapping[str, Any] | None, refused: Sequence[int] = ()
) -> dict[str, Any]:
    """What was measured of a model, without what is one per request.

    Args:
        measured, attack: what :class:`~ssah.studies.paired_measures.Evaluation` found.
        refused: 0 or 1 for each harmless request, where some were asked.

    Returns:
        ``<name>_loss`` of each set of rows, ``refusal_margin``, ``refuses`` and its interval; with
        an attack ``asr``, ``asr_coherent`` (under the first judge) and ``incoherent``, rates with
        their intervals, ``mean_tokens`` of an answer, and ``judges``: the rates under each; with
        ``refused`` also ``over_refusal``, a rate, and its interval.
    """
    found: dict[str, Any] = {
        f"{name}_loss": losses["loss"] for name, losses in measured["losses"].items()
    }
    found |= {key: measured[key] for key in ("refusal_margin", "refuses", "refuses_interval")}
    if refused:
        own = rate(refused)
        found |= {"over_refusal": own["rate"], "over_refusal_interval": own["interval"]}
    if attack is None:  # no request was answered: what needs answers is left out, not 0
        return found
    judges = {
        name: {key: each[key] for key in ("asr", "asr_coherent", "judge")}
        for name, each in attack["judges"].items()
    }
    first = next(iter(judges.values()))  # the judge that decides
    incoherent = attack["incoherent"]
    return found | {
        "requests": attack["requests"],
        "asr": first["asr"]["rate"],
        "asr_interval": first["asr"]["interval"],
        "asr_coherent": first["asr_coherent"]["rate"],
        "asr_coherent_interval": first["asr_coherent"]["interval"],
        "incoherent": incoherent["rate"],
        "incoherent_interval": incoherent["interval"],
        "mean_tokens": attack["mean_tokens"],
        "judges": judges,
    }


def losses(measured: Mapping[str, Any], name: str) -> Tensor:
    """Float64 ``[rows]`` whose mean is the loss per token: a row's nats / mean tokens of a row.

    Differences of two models on the same rows therefore average to the difference of their losses.
    """
    own = measured["losses"][name]
    # Not nats / tokens of the row: a mean of these would weigh short answers as much as long ones.
    nats = torch.tensor(own["nats"], dtype=torch.float64)
    return nats / (sum(own["tokens"]) / len(own["tokens"]))


def succeeded(attack: Mapping[str, Any]) -> Tensor:
    """Float64 ``[requests]``: 1 where the attack succeeded under the first judge."""
    first = next(iter(attack["judges"].values()))
    return torch.tensor(first["success"], dtype=torch.float64)


def kl_summary(found: Mapping[str, Any], *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """``kl`` and ``kl_first``, nats, with their intervals: over positions, and at the first one.

    Args:
        found: the fields of a `Divergence` as lists, one value a row.
        level, seed: of the intervals.
    """
    own = Divergence(
        **{key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}
    )
    shown: dict[str, Any] = {}
    for key, values in (("kl", own.per_row), ("kl_first", own.first)):  # [rows]
        interval = bootstrap(values, level=level, seed=seed)
        shown |= {key: float(values.mean()), f"{key}_interval": list(interval)}
    return shown


def measured_line(measured: Mapping[str, Any]) -> str:
    """Margin and losses, in a line."""
    parts = [f"{name} loss {each['loss']:.3f}" for name, each in measured["losses"].items()]
    return f"margin {measured['refusal_margin']:+.2f}, {', '.join(parts)}"


def attack_line(attack: Mapping[str, Any]) -> str:
    """Rates under each judge, in a line."""
    rates = [f"ASR {each['asr']['rate']:.1%} ({name})" for name, each in attack["judges"].items()]
    return f"{', '.join(rates)}, incoherent {attack['incoherent']['rate']:.1%}"
