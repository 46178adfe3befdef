"""lm-eval's command line with the model ``ssah``: ``python -m ssah.evaluation.harnesses``."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

import ssah


def main() -> None:
    """Run ``lm_eval`` with the arguments of this process."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("error: lm-eval is not installed: pip install 'ssah[eval]'")
    from lm_eval.__main__ import cli_evaluate

    from ssah.evaluation.harnesses import lm_eval_model  # noqa: F401 (registers the model)

    try:
        cli_evaluate()
    except (OSError, ValueError) as error:
        # What ssah refuses is told in one line, as by its own commands. The rest is lm-eval's.
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(where).is_relative_to(Path(ssah.__file__).parent):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
