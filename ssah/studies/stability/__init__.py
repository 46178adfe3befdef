"""``ssah stability``: would other prompts have given the same groups?"""

from __future__ import annotations

from ssah.lazy import submodules_of

__getattr__ = submodules_of(__name__)
