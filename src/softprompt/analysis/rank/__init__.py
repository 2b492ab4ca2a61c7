"""The rank of a trained prompt, the rank its task needs, and how heavy-tailed a backbone's inputs are."""

from softprompt.analysis.rank.burstiness import Burstiness, Distribution, Pair, burstiness, whitened
from softprompt.analysis.rank.gradient import GradientPoint, gradient_spectra
from softprompt.analysis.rank.loaded_prompt import LoadedPrompt, load_prompts, spectra, with_sample_images
from softprompt.analysis.rank.prompt_ranks import PromptRanks, measure
from softprompt.analysis.rank.scorer import Truncation
from softprompt.analysis.rank.spectrum import Spectrum, truncated_svd
from softprompt.analysis.rank.suggestion import Suggestion, suggest_rank
from softprompt.analysis.rank.truncation import FunctionalRank, TruncatedScore, functional_rank, ranks_up_to
from softprompt.evaluation.significance import Drop, drop

__all__ = [
    "Burstiness",
    "Distribution",
    "Drop",
    "FunctionalRank",
    "GradientPoint",
    "LoadedPrompt",
    "Pair",
    "PromptRanks",
    "Spectrum",
    "Suggestion",
    "TruncatedScore",
    "Truncation",
    "burstiness",
    "drop",
    "functional_rank",
    "gradient_spectra",
    "load_prompts",
    "measure",
    "ranks_up_to",
    "spectra",
    "suggest_rank",
    "truncated_svd",
    "whitened",
    "with_sample_images",
]
