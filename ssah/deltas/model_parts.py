"""Which part of a model a parameter belongs to: embedding, attention, mlp, norm, head or other."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from ssah.units import find_modules, layers_path

PARTS = ("embedding", "attention", "mlp", "norm", "head", "other")


def parts_of(model: PreTrainedModel) -> dict[str, tuple[str, int | None]]:
    """Every parameter of ``model`` -> its part of `PARTS`, and the number of its layer if any.

    What stands beside B in one module of a layer is of its part: Q and K, for example, as O does,
    and the router of experts. A tied head is the embedding.

    Raises:
        ValueError, TypeError: the architecture is unknown.
    """
    path = layers_path(model)
    kinds = dict(_kinds(model, path))
    ends = {
        f"{name}.weight": part
        for name, module in model.named_modules()
        for part, end in (
            ("embedding", model.get_input_embeddings()),
            ("head", model.get_output_embeddings()),
        )
        if module is end
    }
    found: dict[str, tuple[str, int | None]] = {}
    for name, _ in model.named_parameters():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
        inside = name.startswith(f"{path}.")
        layer, _, rest = name.removeprefix(f"{path}.").partition(".") if inside else ("", "", name)
        part = ends.get(name, "other")
        if "norm" in owner:  # of whatever kind, and also those inside attention
            part = "norm"
        elif inside:
            pieces = rest.split(".")
            starts = [".".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
            part = next((kinds[each] for each in starts if each in kinds), "other")
        found[name] = part, int(layer) if inside else None
    return found


def _kinds(model: PreTrainedModel, path: str) -> Iterator[tuple[str, str]]:
    """What the name of a parameter within its layer starts with -> ``"mlp"`` or ``"attention"``."""
    for module in find_modules(model).values():
        for owned in (*module.inputs, module.output):
            inside = owned.param.removeprefix(f"{path}.").partition(".")[2]
            yield inside, module.kind
            if inside.count(".") > 1:  # its own projection lies in a module of the layer
                yield inside.partition(".")[0], module.kind
