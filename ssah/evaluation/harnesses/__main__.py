"""lm-eval's command line with the model ``ssah``: ``python -m ssah.evaluation.harnesses``."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run ``lm_eval`` with the arguments of this process."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("error: lm-eval is not installed: pip install 'ssah[eval]'")
    from lm_eval.__main__ import cli_evaluate

    from ssah.evaluation.harnesses import lm_eval_model  # noqa: F401 (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    main()
