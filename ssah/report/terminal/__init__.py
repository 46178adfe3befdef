"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.report.terminal.by_row import LETTERS, row_tables
    from ssah.report.terminal.comparison import compare_tables
    from ssah.report.terminal.comparison_plan import compare_plan
    from ssah.report.terminal.deltas import delta_tables
    from ssah.report.terminal.diagnosis import diagnosis_tables
    from ssah.report.terminal.evaluation import ablated_name, evaluation_tables
    from ssah.report.terminal.experiments import scan_tables, stability_tables, study_tables
    from ssah.report.terminal.installation import installation_tables, model_tables
    from ssah.report.terminal.methods import method_tables, methods_table
    from ssah.report.terminal.paired_models import (
        check_tables,
        protect_preview,
        protect_tables,
    )
    from ssah.report.terminal.probe import probe_tables
    from ssah.report.terminal.tables import (
        ablation_table,
        as_data,
        facts_table,
        groups_table,
        layers,
        new_table,
    )
    from ssah.report.terminal.training import preview_table, trained_table
    from ssah.report.terminal.transfer import transfer_table

__all__ = [
    "LETTERS",
    "ablated_name",
    "ablation_table",
    "as_data",
    "check_tables",
    "compare_plan",
    "compare_tables",
    "delta_tables",
    "diagnosis_tables",
    "evaluation_tables",
    "facts_table",
    "groups_table",
    "installation_tables",
    "layers",
    "method_tables",
    "methods_table",
    "model_tables",
    "new_table",
    "preview_table",
    "probe_tables",
    "protect_preview",
    "protect_tables",
    "row_tables",
    "scan_tables",
    "stability_tables",
    "study_tables",
    "trained_table",
    "transfer_table",
]

__getattr__ = names_of(
    __name__,
    by_row="LETTERS row_tables",
    comparison="compare_tables",
    comparison_plan="compare_plan",
    deltas="delta_tables",
    diagnosis="diagnosis_tables",
    evaluation="ablated_name evaluation_tables",
    experiments="scan_tables stability_tables study_tables",
    installation="installation_tables model_tables",
    methods="method_tables methods_table",
    paired_models="check_tables protect_preview protect_tables",
    probe="probe_tables",
    tables="ablation_table as_data facts_table groups_table layers new_table",
    training="preview_table trained_table",
    transfer="transfer_table",
)
