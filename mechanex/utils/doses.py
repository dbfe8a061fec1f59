"""What steering does, what it costs, and which dose to take: measured on a model object."""

from __future__ import annotations

from ..engine.doses.ability import ChoiceQuestion, read_questions
from ..engine.doses.calibrate import calibrate
from ..engine.doses.dose import Dose
from ..engine.doses.dose_report import DoseReport
from ..engine.doses.measure import measure
from ..engine.doses.scorers import classifier, word_share
from ..engine.doses.sweep import sweep
from ..engine.doses.swept import Swept
from ..engine.doses.tune import tune

__all__ = [
    "ChoiceQuestion",
    "Dose",
    "DoseReport",
    "Swept",
    "calibrate",
    "classifier",
    "measure",
    "read_questions",
    "sweep",
    "tune",
    "word_share",
]
