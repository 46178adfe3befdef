"""Measuring and training many models, each experiment one command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssah.lazy import names_of

if TYPE_CHECKING:
    from ssah.studies.choosing import Choosing
    from ssah.studies.diagnosis import diagnose
    from ssah.studies.loading import Loading
    from ssah.studies.probe import run_probe
    from ssah.studies.run_folder import OutOfTime
    from ssah.studies.transfer import run_transfer, transfer_summary

__all__ = [
    "Choosing",
    "Loading",
    "OutOfTime",
    "diagnose",
    "run_probe",
    "run_transfer",
    "transfer_summary",
]

__getattr__ = names_of(
    __name__,
    choosing="Choosing",
    diagnosis="diagnose",
    loading="Loading",
    probe="run_probe",
    run_folder="OutOfTime",
    transfer="run_transfer transfer_summary",
)
