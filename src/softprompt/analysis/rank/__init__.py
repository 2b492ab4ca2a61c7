"""What rank a prompt has, and what rank its task needs; and how bursty a backbone's inputs are."""

from softprompt.analysis.rank.bench import Truncation
from softprompt.analysis.rank.burstiness import Burstiness, Distribution, Pair, burstiness, whitened
from softprompt.analysis.rank.functional import Cut, Functional, functional_rank, ranks_up_to
from softprompt.analysis.rank.gradient import GradientPoint, gradient_spectra
from softprompt.analysis.rank.measured import Measured, measure
from softprompt.analysis.rank.spectrum import Spectrum, best_part
from softprompt.analysis.rank.subject import LoadedPrompt, subjects, views, with_sample_images
from softprompt.analysis.rank.suggestion import Suggestion, suggest_rank
from softprompt.evaluation.significance import Drop, drop

__all__ = [
    "Burstiness",
    "Cut",
    "Distribution",
    "Drop",
    "Functional",
    "GradientPoint",
    "LoadedPrompt",
    "Measured",
    "Pair",
    "Spectrum",
    "Suggestion",
    "Truncation",
    "best_part",
    "burstiness",
    "drop",
    "functional_rank",
    "gradient_spectra",
    "measure",
    "ranks_up_to",
    "subjects",
    "suggest_rank",
    "views",
    "whitened",
    "with_sample_images",
]
