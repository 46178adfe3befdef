"""Groups as tables: counts by module and layer, a row for each unit, and a card for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssah.groups.checks import GROUPS
from ssah.storage import public_name, result_card, save_tensors, upload
from ssah.units import layer_of, unit_frame

if TYPE_CHECKING:
    from pandas import DataFrame


def group_counts(labels_of: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `UnitGroups.summary` returns, of labels: module -> uint8 ``[n_units]``."""
    modules: list[dict[str, Any]] = []
    layers: dict[int | None, dict[str, int]] = {}
    for name, labels in labels_of.items():
        members = torch.bincount(labels, minlength=len(GROUPS)).tolist()  # [4]
        counts = {"units": len(labels), **dict(zip(GROUPS, members, strict=True))}
        modules.append({"module": name, "layer": layer_of(name), **counts})
        layer = layers.setdefault(layer_of(name), dict.fromkeys(counts, 0))
        for column, n in counts.items():
            layer[column] += n
    total = sum(len(labels) for labels in labels_of.values())
    sizes = {group: sum(module[group] for module in modules) for group in GROUPS}
    return {
        "units": total,
        "groups": {group: {"units": n, "fraction": n / total} for group, n in sizes.items()},
        "modules": modules,
        "layers": [{"layer": number, **counts} for number, counts in layers.items()],
    }


def group_frame(
    labels_of: Mapping[str, Tensor], safety: Mapping[str, Tensor], utility: Mapping[str, Tensor]
) -> DataFrame:
    """A row for each unit; module -> labels, uint8 ``[n_units]``, and scores ``[n_units]``."""
    every = {name: torch.arange(len(labels)) for name, labels in labels_of.items()}
    values = {"group": labels_of, "safety": safety, "utility": utility}
    frame = unit_frame(every, values)
    frame["group"] = frame["group"].map(dict(enumerate(GROUPS)))
    return frame


def upload_groups(
    repo_id: str,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    counts: Mapping[str, Any],
    figures: Mapping[str, Any] | None,
    **options: Any,
) -> str:
    """What `UnitGroups.push_to_hub` does.

    Args:
        repo_id, options: as of `ssah.storage.upload`.
        tensors, meta: what `UnitGroups.save` writes; tensors are ``[n_units]``.
        counts: what `group_counts` returned.
        figures: as of `ssah.storage.result_card`.
    """
    public = {**meta, "model_name": public_name(str(meta["model_name"]))}
    card = _card(counts, public, figures)
    return upload(lambda at: save_tensors(at, tensors, public), card, repo_id, **options)


def _card(
    counts: Mapping[str, Any], meta: Mapping[str, Any], figures: Mapping[str, Any] | None
) -> str:
    """``README.md`` of groups on the Hub; arguments as of `upload_groups`, ``meta`` public."""
    data = meta["data_fingerprint"] or {}
    sizes = {
        f"units in {group}": f"{own['units']:,} ({own['fraction']:.2%})"
        for group, own in counts["groups"].items()
    }
    facts = {
        "units of the model": f"{counts['units']:,}",
        **sizes,
        "shares asked for": ", ".join(
            f"{name} {share:g}" for name, share in meta["shares"].items()
        ),
        "ranked over, normalised by": f"{meta['scope']}, {meta['normalize']}",
        "metric": meta["metric"],
        "tokens": meta["tokens"],
        "fingerprint of the safety data": data.get("safety"),
        "fingerprint of the utility data": data.get("utility"),
        "hash of the units": meta["units_hash"],
        "hash of the weights": meta["weights_hash"],
    }
    return result_card(
        "Unit groups",
        "They sort the neurons (units) of the model into safety-critical (scu), utility-critical "
        "(ucu), redundant (ru) and complex (cu) ones, after Li & Kim, arXiv 2410.10862.",
        base_model=str(meta["model_name"]),
        tags=("safety", "neurons", "unit-groups"),
        code='groups = ssah.UnitGroups.load("hf:user/name")  # this repository\n'
        'with ssah.ablate(model, groups["scu"]):\n    ...',
        facts=facts,
        figures=figures,
    )
