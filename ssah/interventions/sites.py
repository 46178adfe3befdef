"""Where in a layer hidden states are changed: which module's input or output that is.

    site           of a Llama layer                of a GPT-2 layer
    "output"       model.layers.0, its output      transformer.h.0
    "input"        model.layers.0, its input       transformer.h.0
    "attention"    ...self_attn.o_proj             ...attn.c_proj
    "ffn"          ...mlp.down_proj                ...mlp.c_proj

What attention or an FFN puts out is what its B puts out, before a norm that some models (Gemma 2)
have after it. An FFN of experts has several: the routed ones together, and each shared one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import nn

from ssah.choices import check_choice
from ssah.units import find_modules, layers_path

Site: TypeAlias = Literal["output", "input", "attention", "ffn"]

_KINDS = {"attention": "attention", "ffn": "mlp"}


def modules_at(model: nn.Module, layers: list[int], site: Site) -> list[list[nn.Module]]:
    """The modules of each layer; none of one that has no such part.

    Raises:
        ValueError: there is no such site, or no layer has it.
    """
    check_choice("site", site, get_args(Site))
    path = layers_path(model)
    if site in ("output", "input"):
        return [[model.get_submodule(f"{path}.{layer}")] for layer in layers]
    own = [each for each in find_modules(model).values() if each.kind == _KINDS[site]]
    # A dict: all routed experts of a layer put out through one module.
    found = [
        list({each.down: None for each in own if each.name.startswith(f"{path}.{layer}.")})
        for layer in layers
    ]
    if not any(found):
        raise ValueError(
            f"site is {site!r}, which none of the layers {layers} has; it must be 'output' or "
            "'input' in them"
        )
    return found
