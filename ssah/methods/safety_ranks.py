"""Safety ranks: directions of what projections put out that matter for safety and not for utility.

Wei et al. 2024, arXiv 2402.05162, section 3. With X the inputs of a projection W ``[out, in]`` on a
set, Pi projects on the leading left singular directions of W X:

    dW = (I - Pi_u) Pi_s W,   W <- W - dW          of rank at most that of Pi_s

Example: W = I in the plane. On safety it puts out mostly (1, 0), and on utility mostly (0, 1). With
one direction each, dW = [[1, 0], [0, 0]] and W - dW = [[0, 0], [0, 1]]. Were both (1, 0), dW would
be 0: what utility needs is not removed.

The directions are eigenvectors of W G W^T, with G the Gram matrix of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah.deltas.subspaces import Subspace, gram, output_subspace
from ssah.interventions import Replace
from ssah.methods.drawing import random_subspace
from ssah.methods.frame import Aim, Method, Stage
from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Changed
from ssah.settings import setting
from ssah.units import features, layers_path


@dataclass(frozen=True)
class RankRemoval(Method):
    """Remove directions safety alone needs."""

    name: ClassVar[str] = "safety-ranks"
    paper: ClassVar[str] = "Wei et al., Assessing the Brittleness of Safety, arXiv 2402.05162"
    equation: ClassVar[str] = "W <- W - (I - Pi_u) Pi_s W, Pi of leading directions of W X (ActSVD)"
    stage: ClassVar[Stage] = "locate"
    aim: ClassVar[Aim] = "remove"
    needs: ClassVar[tuple[Need, ...]] = ("aligned", "safety", "utility")
    departures: ClassVar[tuple[str, ...]] = (
        "A rank says how many leading directions count; the paper's r says how many do not.",
        "All directions are of the model as it is. The published code takes those of a layer from "
        "a model whose earlier layers are changed already, and by a random SVD.",
    )
    against: ClassVar[str] = "Random directions in the place of Pi_s, Pi_u as it is."
    published: ClassVar[str] = "ASR .71 at rank 6, accuracy as before (Llama-2-7B-Chat)."

    safety_rank: int = setting(6, "Directions of safety.", min=1)
    utility_rank: int = setting(96, "Directions of utility, which are spared.", min=1)

    def _find(self, inputs: Inputs) -> Changed:
        model = inputs.model
        self._check_ranks(model)
        safety, utility = (gram(model, loader) for loader in inputs.loaders)
        # Bases are kept, and not Gram matrices: the control needs the same ones.
        spaces: dict[str, tuple[Subspace, Subspace]] = {}
        for name in safety:
            weight, _ = _weight(inputs, name)
            spaces[name] = (
                output_subspace(weight, safety[name], self.safety_rank),
                output_subspace(weight, utility[name], self.utility_rank),
            )

        def changes(seed: int | None) -> tuple[Replace]:
            values: dict[str, Tensor] = {}
            for name, (of_safety, of_utility) in spaces.items():
                weight, turned = _weight(inputs, name)
                # Utility is spared by both: the control is of what counts as safety.
                if seed is not None:
                    of_safety = random_subspace(of_safety.n, of_safety.rank, seed, name)
                w = weight.double()
                removed = of_utility.away(of_safety.onto(w, 0), 0)  # [out, in]
                left = (w - removed).to(weight.dtype)
                values[f"{name}.weight"] = (left.T if turned else left).contiguous()
            return (Replace(list(values), values),)

        return Changed(changes(None), changes, facts={"matrices": len(spaces)})

    def _check_ranks(self, model: PreTrainedModel) -> None:
        """Refuse, before any row is read, more directions than a projection has outputs."""
        start = f"{layers_path(model)}."
        outputs, name = min(
            (features(module)[1], name)
            for name, module in model.named_modules()
            if name.startswith(start) and isinstance(module, nn.Linear | Conv1D)
        )
        for which in ("safety_rank", "utility_rank"):
            rank = getattr(self, which)
            if rank > outputs:
                raise ValueError(
                    f"{which} is {rank}; it must be at most {outputs}, the outputs of {name!r}, "
                    "which has the fewest: give a lower one"
                )


def _weight(inputs: Inputs, name: str) -> tuple[Tensor, bool]:
    """The weight of a projection as ``[out, in]``, and whether it is kept as ``[in, out]``."""
    module = inputs.model.get_submodule(name)
    turned = isinstance(module, Conv1D)
    weight: Tensor = module.get_parameter("weight").detach()
    return (weight.T if turned else weight), turned
