"""Importance as an importance matrix of llama.cpp, by which ``llama-quantize`` rounds weights.

An importance matrix (imatrix) has, for every weight that a token is multiplied with, the sum over n
tokens of each input channel's square, and n. llama-quantize divides the one by the other: channel j
of a weight is rounded with the care E[x_j^2]. The inputs of B are the activations of units, so that
scores of any metric know it for every B, from their mean and their unbiased variance:

    E[x^2] = variance * (n - 1) / n + mean^2        in_sum2 = n * E[x^2]        counts = n

Example: the activations 1 and 3 (mean 2, variance 2, n 2) give E[x^2] = 2 * 1 / 2 + 4 = 5 and the
sum 10, as of 1 + 9. It is the metric ``"norm"`` without the squared norms of B's columns.

The file, in the order of the modules, all tensors float32:

    blk.0.ffn_down.weight.in_sum2   [1, units], of a mixture's experts [experts, units]
    blk.0.ffn_down.weight.counts    [1, 1], of experts [experts, 1]: each has its own tokens
    general.type "imatrix"   imatrix.datasets   imatrix.chunk_count, imatrix.chunk_size

Source: ``tools/imatrix/imatrix.cpp`` and ``tools/quantize/quantize.cpp`` of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssah.attribution.result import Attribution
from ssah.models import text_config
from ssah.storage import check_replaceable, write_whole
from ssah.units import DepthTwoModule, find_modules, gguf_architecture

if TYPE_CHECKING:
    from gguf import TensorNameMap

# The field general.type of a GGUF file: its key, a string of 7 bytes, "imatrix".
_MARK = b"general.type" + struct.pack("<IQ", 8, 7) + b"imatrix"


def save_imatrix(
    attribution: Attribution, path: str | os.PathLike[str], model: nn.Module
) -> dict[str, Tensor]:
    """Write the mean square of every unit as an importance matrix of llama.cpp, in GGUF form.

    It has the inputs of B alone, ``ffn_down`` and ``attn_output``: those of gate, up, Q, K and V
    are no units. Example: ``save_imatrix(safety, "safety.gguf", model)``, then
    ``llama-quantize --imatrix safety.gguf model.gguf model-q4.gguf Q4_K_M``.

    Args:
        attribution: scores of any metric; which of its tokens counted is written beside them.
        path: the file; an earlier importance matrix there is replaced in one step.
        model: the model that was scored; one on the meta device will do.

    Returns:
        what llama-quantize reads: name of the weight -> E[x^2], float64 ``[experts or 1, units]``.

    Raises:
        ImportError: ``gguf`` is not installed.
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        FileExistsError: ``path`` is a file of another kind, a model for one.
        ValueError: the scores are of another model, every expert was given every token, a layer
            lacks some of its experts, or llama.cpp has no such architecture or weight.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "an imatrix is written with gguf, which is not installed: pip install 'gguf>=0.19'"
        )
    check_replaceable(Path(path), _MARK, "importance matrix")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"path is {os.fspath(path)!r}, whose folder does not exist; it must be made before"
        )
    attribution.check_model(model)
    if attribution.all_experts:
        raise ValueError(
            "attribution was made with all_experts=True, must be made without: llama.cpp "
            "multiplies an expert with the tokens that are routed to it, and with no others"
        )
    found = find_modules(model)
    weights = _by_weight(model, {name: found[name] for name in attribution.scores})
    squares = {  # name of the weight -> [experts or 1, units]
        weight: torch.stack([_mean_square(attribution, name) for name in names])
        for weight, names in weights.items()
    }
    counts = {
        weight: torch.tensor([[attribution.count[name]] for name in names], dtype=torch.float64)
        for weight, names in weights.items()
    }
    _write(Path(path), squares, counts, f"{attribution.tokens} {attribution.data_fingerprint}")
    return squares


def _mean_square(attribution: Attribution, name: str) -> Tensor:
    """E[x^2] of what enters B, float64 ``[units]``; 0 where no token was counted."""
    n, mean = attribution.count[name], attribution.mean[name]
    if n < 2:  # of one token the unbiased variance is NaN, and there is nothing to add
        return mean.square()
    return attribution.variance[name] * ((n - 1) / n) + mean.square()


def _by_weight(model: nn.Module, modules: Mapping[str, DepthTwoModule]) -> dict[str, list[str]]:
    """llama.cpp's name of each B -> the modules in it: one, or the experts of a layer in order."""
    names = _tensor_names(model)
    weights: dict[str, list[str]] = {}
    for name, module in modules.items():
        # As llama.cpp's converter does with models that also see.
        param = module.output.param.removesuffix(".weight").replace("language_model.", "")
        weight = names.get_name(param)
        if weight is None:
            raise ValueError(
                f"attribution has the module {name!r}, which has no name in GGUF files of "
                f"{text_config(model).model_type!r} models; leave its kind ({module.kind!r}) out: "
                "attribute(..., modules=...)"
            )
        weights.setdefault(f"{weight}.weight", []).append(name)
    for weight, own in weights.items():
        routed = modules[own[0]].routed
        if routed is not None and len(own) != routed.n_experts:
            raise ValueError(
                f"attribution has {len(own)} of the {routed.n_experts} experts in {weight!r}, "
                "must have all of them: GGUF keeps them in one tensor"
            )
    return weights


def _tensor_names(model: nn.Module) -> TensorNameMap:
    """Which tensor of a GGUF file each module of ``model`` becomes, by the word of gguf-py."""
    import gguf

    config = text_config(model)
    model_type = config.model_type
    plain = _plain(gguf_architecture(model_type))
    known = {_plain(word): architecture for architecture, word in gguf.MODEL_ARCH_NAMES.items()}
    if plain not in known:
        raise ValueError(
            f"model has the architecture {model_type!r}, must be one that GGUF files have a name "
            f"for: gguf {version('gguf')} knows none of this name"
        )
    return gguf.get_tensor_name_map(known[plain], config.num_hidden_layers)


def _plain(architecture: str) -> str:
    return architecture.replace("_", "").replace("-", "")


def _write(
    path: Path, squares: Mapping[str, Tensor], counts: Mapping[str, Tensor], dataset: str
) -> None:
    """Write ``squares``, ``[experts or 1, units]``, and ``counts``, ``[experts or 1, 1]``."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """Nothing: an importance matrix is of no architecture, and llama.cpp writes none."""

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "imatrix"
        writer = Writer(file, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        # llama.cpp counts chunks of tokens, and a chunk is one token here.
        most = max(int(count.max()) for count in counts.values())
        writer.add_uint32("imatrix.chunk_count", most)
        writer.add_uint32("imatrix.chunk_size", 1)
        for weight, square in squares.items():
            count = counts[weight]
            writer.add_tensor(f"{weight}.in_sum2", (square * count).float().numpy())
            writer.add_tensor(f"{weight}.counts", count.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_whole(path, file.read_bytes())
