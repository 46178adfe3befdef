"""Notes that other libraries log while they are imported, and that say nothing to the user.

transformers imports torchao wherever it is installed, whatever a model's weights are. torchao then
logs that compiled kernels for other machines or another torch do not load, and torch logs a
deprecation of torchao's. They would be the first lines of every command.
"""

from __future__ import annotations

import logging

_NOTES = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("register_constant() on Enum subclasses",),
}


def leave_out_notes() -> None:
    """Leave these notes out from now on; everything else that the two say stays."""
    for name, texts in _NOTES.items():
        logging.getLogger(name).addFilter(Without(texts))


class Without(logging.Filter):
    """Lets every record pass that has none of ``texts`` in it."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in self.texts)
