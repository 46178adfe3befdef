"""torchao, which transformers imports wherever it is installed, whatever a model's weights are.

While it is imported it logs that compiled kernels for other machines do not load, and torch logs a
deprecation of torchao's. Both would be the first lines of every command.
"""

from __future__ import annotations

import logging

__all__ = ["leave_out_notes"]

_NOTES = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "register_constant() on Enum subclasses",
}


def leave_out_notes() -> None:
    """Leave these two notes out from now on; everything else that the two say stays."""
    for name, text in _NOTES.items():
        logging.getLogger(name).addFilter(_Without(text))


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()
