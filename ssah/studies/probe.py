"""Probe (Li & Kim, figures 2 to 4): a model's hidden states beside those of another one.

Of each request, three versions are read: as it is, opened by a refusal, and opened by a compliance.
The distance of the first to each of the other two, less that of two requests that have nothing to
do with one another, says which way the model leans at a layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ssah.evaluation import COMPLIANCE, OPENING, REFUSAL, Probe, fitting, opened, probe, prompts
from ssah.models import weights_hash
from ssah.report.pictures import plot_probe
from ssah.storage import check_free
from ssah.studies.claims import claim
from ssah.studies.loading import Loading
from ssah.studies.run_folder import Run
from ssah.studies.sources import Sources
from ssah.studies.step_bars import Steps

KIND = "probe"
_MODEL, _BESIDE = "model", "beside"


def run_probe(
    out: str | os.PathLike[str],
    model: Loading,
    requests: str | Sequence[str],
    *,
    beside: str | None = None,
    tokens: int = 10,
    refusal: str = REFUSAL,
    compliance: str = COMPLIANCE,
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[str, Any]:
    """Probe a model, and perhaps another one, on the same requests; goes on where it stopped.

    Args:
        out: folder of the run: its record, both probes and a picture.
        model: the aligned model.
        requests: harmful requests, as ``ssah.data.load_requests`` takes them.
        beside: the model to compare with, an unaligned one for instance, loaded in the same way.
        tokens, refusal, compliance, batch_size, max_length: as :func:`ssah.probe` takes them.

    Returns:
        The record, as ``experiment.json`` has it.

    Raises:
        ValueError: ``beside`` is the model itself, or the folder has another run, or one with
            other weights.
    """
    check_free(out)
    if beside == model.name:
        raise ValueError(f"beside is {beside!r}, which is the model itself; must be another one")
    sources = Sources(model.reading)
    names = {_MODEL: model.name, **({} if beside is None else {_BESIDE: beside})}
    options = {
        "tokens": tokens,
        "refusal": refusal,
        "compliance": compliance,
        "max_length": max_length,
    }
    given = sources.requests("requests", requests)
    asked = _fitting_all(model, names.values(), given, (refusal, compliance), max_length)
    settings = {**model.settings(), "beside": beside, **options, "seed": 0}
    run = Run(out, KIND, settings, sources.record)
    weights: dict[str, str] = {}  # known only once a model is loaded, so no part of the settings
    with Steps(run, len(names)) as steps:
        for role, name in names.items():
            weights[role] = _probed(steps, model, role, name, asked, batch_size, options)
    probes = {names[role]: Probe.load(run.out / role) for role in names}
    title = f"Which way {model.name} reasons on {len(asked)} harmful requests"
    picture = plot_probe(probes, run.out / "probe.png", title)
    rows = [
        {"model": name, "role": role, "weights": weights[role], **_measured(found)}
        for (role, name), found in zip(names.items(), probes.values(), strict=True)
    ]
    claims = _claims(names, [*probes.values()])
    return run.finish({"requests": len(asked), "models": rows, "claims": claims}, [picture])


def _fitting_all(
    loading: Loading,
    names: Iterable[str],
    requests: list[str],
    openings: Sequence[str],
    max_length: int,
) -> list[str]:
    """The requests that fit every model, so that all are asked the same; from tokenizers alone."""
    for name in names:
        own = loading.tokenizer(name)
        encoded = prompts(own, requests)
        most = max_length - OPENING
        requests = fitting(requests, encoded, most, overlong=loading.reading.overlong)
        for opening in openings:
            opened(requests, opening, own, max_length=max_length)
    if len(requests) < 2:
        raise ValueError(f"requests has {len(requests)}, must have at least 2: the baseline")
    return requests


def _probed(
    steps: Steps,
    loading: Loading,
    role: str,
    name: str,
    requests: Sequence[str],
    batch_size: int,
    options: Mapping[str, Any],
) -> str:
    """Probe one model, a step, and keep the probe in the folder of its role; its weights' hash."""
    # Local, so that it is gone before the next model is loaded: both may not fit.
    loaded, tokenizer = loading(loading.dtype, name)
    weights, out = weights_hash(loaded), steps.run.out

    def compute() -> dict[str, str]:
        with steps.part("requests", len(requests)) as advance:
            found = probe(
                loaded, tokenizer, requests, batch_size=batch_size, advance=advance, **options
            )
        found.save(out / role)
        return {"weights": weights}

    if steps(f"probe-{role}", compute)["weights"] != weights:
        raise ValueError(
            f"{str(out)!r} has this experiment with other weights of {name!r}: take another "
            "folder, or remove this one"
        )
    return weights


def _measured(found: Probe) -> dict[str, Any]:
    """Of one model: means and intervals per layer, and of the difference per number of tokens."""
    over_layers = found.differences.mean(2)  # [requests, tokens, layers + 1] -> [requests, tokens]
    # Index -1 is over all tokens that were generated: [requests, layers + 1].
    parts = {
        "refusal": found.refusal_distances[:, -1] - found.baselines[-1],
        "compliance": found.compliance_distances[:, -1] - found.baselines[-1],
        "difference": found.differences[:, -1],
    }
    return {
        "safe_from": found.safe_from(),
        "by_layer": {
            "baseline": found.baselines[-1].tolist(),
            **{
                key: value
                for name, part in parts.items()
                for key, value in (
                    (name, part.mean(0).tolist()),
                    (f"{name}_intervals", found.intervals(part).tolist()),
                )
            },
        },
        "by_tokens": {
            "difference": over_layers.mean(0).tolist(),
            "difference_intervals": found.intervals(over_layers).tolist(),
        },
    }


def _claims(names: Mapping[str, str], probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """What the paper says of such models, and whether it holds here: at the last layer."""
    own = probes[0]
    first = own.safe_from()  # a layer, or None
    note = (
        "Its interval lies above 0 at no layer up to the last."
        if first is None
        else f"Its interval lies above 0 from layer {first} on."
    )
    text = f"An aligned model ({names[_MODEL]}) is nearer to the refusal than to the compliance"
    claims = [claim(text, *_last(own), "higher", "cosine", note=note)]
    if _BESIDE in names:
        other = probes[1]
        text = f"An unaligned model ({names[_BESIDE]}) is nearer to the compliance"
        claims.append(claim(text, *_last(other), "lower", "cosine"))
        text = "The aligned model leans to the refusal more than the other one"
        one, two = (each.differences[:, -1, -1] for each in (own, other))  # [requests]
        claims.append(claim(text, one, two, "higher", "cosine"))
    return claims


def _last(found: Probe) -> tuple[Tensor, Tensor]:
    """Distances to the complying and to the refusing version at the last layer, [requests]."""
    return found.compliance_distances[:, -1, -1], found.refusal_distances[:, -1, -1]
