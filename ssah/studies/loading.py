"""How a study loads its model, and in which precision it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ssah.choices import check_choice
from ssah.data import Reading
from ssah.models import DTYPES, check_on_one_device, faster_dtype, quiet
from ssah.studies.step_bars import Steps
from ssah.training import load_trained, load_trained_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READING = Reading()


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        name: as ``ssah.training.load_trained`` takes it: a model, or an update of one.
        dtype: of scoring and measuring; ``"auto"``: what multiplies faster here.
        device: as ``load_model`` takes it.
        trust_remote_code: as ``load_model`` takes it.
        reading: how rows are read, and the chat template.
        base: of an update, see ``load_trained``.
        device_map, offload_folder: as ``load_model`` takes them.
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    reading: Reading = READING
    base: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        # Refused here, because data are read before the model is loaded, and that takes a while.
        check_choice("dtype", self.dtype, DTYPES)

    def check_on_one_device(self, what: str) -> None:
        """Refuse a ``device_map`` for ``what``; see `ssah.models.check_on_one_device`."""
        check_on_one_device(self.device_map, what)

    def __call__(
        self, dtype: str, name: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in ``dtype``, or another one (a folder) loaded in the same way."""
        with quiet():
            model, tokenizer = load_trained(
                name or self.name,
                base=self._base(name),
                dtype=dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                device_map=self.device_map,
                offload_folder=self.offload_folder,
            )
        return model, self.reading.tokenizer(tokenizer)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer alone, of the model or of another one."""
        with quiet():
            found = load_trained_tokenizer(
                name, base=self._base(name), trust_remote_code=self.trust_remote_code
            )
        return self.reading.tokenizer(found)

    def _base(self, name: str | None) -> str | None:
        """``base`` is this model's: another one is found by its own record."""
        return self.base if name in (None, self.name) else None

    def settings(self) -> dict[str, Any]:
        """For the record of a run."""
        fields = asdict(self)
        del fields["reading"]  # flat among the others, as the options of the command are
        # Where weights lie changes no result, and a run may go on elsewhere. Of an update, the hash
        # of the weights is recorded.
        for place in ("base", "device_map", "offload_folder"):
            del fields[place]
        return {"model": fields.pop("name"), **fields, **self.reading.settings()}

    def precision(
        self, steps: Steps, device: torch.device, bf16: bool | None = None
    ) -> tuple[str, bool]:
        """What ``dtype`` means on ``device``, and whether training computes in bfloat16.

        Which is faster is measured once, as a step: a run that goes on must not choose again.
        """

        def choose() -> dict[str, Any]:
            # The name alone, because a step is kept as JSON.
            fast = str(faster_dtype(device)).removeprefix("torch.")
            return {
                "dtype": fast if self.dtype == "auto" else self.dtype,
                "bf16": fast == "bfloat16" if bf16 is None else bf16,
            }

        found = steps("precision", choose, lambda found: found["dtype"])
        return found["dtype"], found["bf16"]
