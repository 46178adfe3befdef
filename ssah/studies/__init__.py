"""Measuring and training many models, each experiment one command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.diagnosis import diagnose
    from ssah.studies.loading import Loading
    from ssah.studies.probe import run_probe
    from ssah.studies.transfer import run_transfer, transfer_summary

__all__ = ["Loading", "diagnose", "run_probe", "run_transfer", "transfer_summary"]

__getattr__ = names_of(
    __name__,
    diagnosis="diagnose",
    loading="Loading",
    probe="run_probe",
    transfer="run_transfer transfer_summary",
)
