"""Pictures (PNG). They need matplotlib, and no display.

Every ``plot_...(what, path, title)`` draws what its first argument says, writes ``title`` over it,
saves it as ``path`` and returns that. It raises ImportError where matplotlib is not installed.
"""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.report.pictures.ablations import plot_ablations
from ssah.report.pictures.pareto import plot_pareto
from ssah.report.pictures.probe import plot_probe
from ssah.report.pictures.scan import plot_compare, plot_scan
from ssah.report.pictures.scores import plot_scores
from ssah.report.pictures.stability import plot_stability
from ssah.report.pictures.study import plot_budget, plot_freeze
from ssah.report.pictures.throughput import plot_throughput
from ssah.report.pictures.transfer import plot_transfer

__all__ = [
    "plot_ablations",
    "plot_budget",
    "plot_compare",
    "plot_freeze",
    "plot_pareto",
    "plot_probe",
    "plot_scan",
    "plot_scores",
    "plot_stability",
    "plot_throughput",
    "plot_transfer",
]

__getattr__ = submodules_of(__name__)
