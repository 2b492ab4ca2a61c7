"""What rank a prompt has, and what rank its task needs; and how bursty a backbone's inputs are."""

from softprompt.rank.bench import Cutting
from softprompt.rank.burstiness import Burstiness, Distribution, Pair, burstiness, whitened
from softprompt.rank.functional import Cut, Functional, functional_rank, ranks_up_to
from softprompt.rank.gradient import GradientPoint, gradient_spectra
from softprompt.rank.measured import Measured, measure
from softprompt.rank.paired import Drop, drop
from softprompt.rank.spectrum import Spectrum, best_part
from softprompt.rank.subject import Subject, seeing, subjects, views
from softprompt.rank.suggestion import Suggestion, suggest_rank

__all__ = [
    "Burstiness",
    "Cut",
    "Cutting",
    "Distribution",
    "Drop",
    "Functional",
    "GradientPoint",
    "Measured",
    "Pair",
    "Spectrum",
    "Subject",
    "Suggestion",
    "best_part",
    "burstiness",
    "drop",
    "functional_rank",
    "gradient_spectra",
    "measure",
    "ranks_up_to",
    "seeing",
    "subjects",
    "suggest_rank",
    "views",
    "whitened",
]
