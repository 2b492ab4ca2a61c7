"""Metrics of written answers: exact match, word overlap, ROUGE-L, chrF and BLEU, against all accepted answers."""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float, Int

from softprompt.tasks.metrics.base import Answers, Metric, Pooled, RowMean, UnitScores

_CACHED_ROWS = 1 << 16
"""Rows whose scores are remembered: significance tests score the same pairs thousands of times."""


_ARTICLES = {"a", "an", "the"}
_OPENING, _SENTENCE = "\"'([{`", ".,;:!?\"'()[]{}`"
_INSIDE = re.compile(r"""["()\[\]{}!?;`]|[.,:'](?!\d)""")
"""Punctuation inside a word; a point, comma, colon or apostrophe before a digit is part of a number."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_HYPHENS = re.compile(r"(?<=[^\W\d_])-+(?=[^\W_])|(?<=\d)-+(?=[^\W\d_])")
"""Hyphens inside a word; not a minus (`-5`), a range (`3-5`) or the end of `O-`."""


@functools.lru_cache(_CACHED_ROWS)
def normalize(text: str) -> str:
    """Casefold, without articles, superfluous space and the punctuation that carries no meaning.

    These stay: symbols (`+ - < > = / % $ # & @` and all beyond ASCII), a point, comma or colon before a digit (but not
    the comma of `1,000`), an article that no word follows, and all of a text that has neither a letter nor a digit.

    >>> [normalize(text) for text in ("The  Cat's hat.", "-3.5", "1,000", "C++!", "A", ":)")]
    ['cats hat', '-3.5', '1000', 'c++', 'a', ':)']
    """
    tokens = text.casefold().split()
    are_words = [any(map(str.isalnum, token)) for token in tokens]
    if not any(are_words):
        return " ".join(tokens)
    normalized = []
    for token, is_word, before_word in zip(tokens, are_words, [*are_words[1:], False], strict=True):
        if is_word and not (before_word and token.lstrip(_OPENING) in _ARTICLES):
            normalized.append(_bare_word(token))
        elif not is_word and token.strip(_SENTENCE):
            normalized.append(token)
    return " ".join(normalized)


def _bare_word(token: str) -> str:
    """A word or number without the punctuation around and inside it; `token` has a letter or a digit."""
    if token.isalnum():
        return token
    stripped = token.lstrip(f"{_SENTENCE}*_")
    point = "." if stripped[:1].isdigit() and token.removesuffix(stripped).endswith(".") else ""
    inner = _THOUSANDS.sub("", point + stripped.rstrip(f"{_SENTENCE}*_"))
    return _HYPHENS.sub("", _INSIDE.sub("", inner))


def squad_normalize(text: str) -> str:
    """Lower case, without any punctuation, articles and superfluous space: what SQuAD and ReCoRD compare.

    Reference: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1.

    >>> [squad_normalize(text) for text in ("The  Cat's hat.", "-3.5", "C++!", "A", ":)")]
    ['cats hat', '35', 'c', '', '']
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


NORMALIZE: Mapping[str, Callable[[str], str]] = {"exact_match": normalize, "token_f1": normalize}
"""What the user's own answers are reduced to before a metric compares them."""


def _exact(normalize: Callable[[str], str]) -> UnitScores:
    """1 where the normalized texts are equal."""
    return _best(lambda prediction, gold: float(normalize(prediction) == normalize(gold)))


def _overlap(normalize: Callable[[str], str]) -> UnitScores:
    """F1 of the normalized words in common; two texts without any word are equal."""

    def f1(prediction: str, gold: str) -> float:
        predicted, expected = normalize(prediction).split(), normalize(gold).split()
        if not predicted or not expected:
            return float(predicted == expected)
        common = sum((Counter(predicted) & Counter(expected)).values())
        return 2 * common / (len(predicted) + len(expected))

    return _best(f1)


_DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "some", "each", "every", "many", "much", "few"}
_DETERMINERS |= {"my", "your", "his", "her", "our", "their", "whose", "which"}


def referent_match(prediction: str, gold: str) -> float:
    """1 where all words of one text are in the other, determiners aside; a possessive only matches a possessive.

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    section 3.1.2 and its code for WSC, where "bunny" matches "the fuzzy bunny".

    >>> referent_match("fuzzy bunny", "The bunny"), referent_match("Bob", "Bob's hat")
    (1.0, 0.0)
    """
    predicted, expected = ({*text.lower().split()} - _DETERMINERS for text in (prediction, gold))
    if not predicted or ("'" in prediction) != ("'" in gold):
        return 0.0
    return float(predicted <= expected or expected <= predicted)


@functools.lru_cache(_CACHED_ROWS)
def rouge_l(prediction: str, gold: str) -> float:
    """F1 of the longest common subsequence of words, without stemming; 0 where a text has no word.

    Words are those of `rouge-score` where the text is ASCII. Its own tokenizer drops every other letter, so that a
    text in another script would always score 0; here words have letters of any script, and scripts without spaces
    between words (Chinese, Japanese, Thai, ...) are compared letter by letter.

    Reference: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, by `rouge-score`.
    """
    return float(_rouge_scorer().score(gold, prediction)["rougeL"].fmeasure)


@final
class _RougeTokenizer:
    """Splits a text into lower-case words, as a tokenizer of `rouge-score`."""

    _UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"

    def __init__(self) -> None:
        import regex  # which sacrebleu, of the same extra, needs too

        word = rf"[{self._UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{self._UNSPACED}]]+"
        self._pattern = regex.compile(word, regex.V1)

    def tokenize(self, text: str) -> list[str]:
        """The words in order."""
        return list(self._pattern.findall(text.lower()))


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_RougeTokenizer())


def _best(compare: Callable[[str, str], float]) -> UnitScores:
    """Scores each row by its best accepted answer; no prediction scores 0."""

    def scores(answers: Answers) -> Float[np.ndarray, "row"]:
        pairs = zip(answers.predictions, answers.golds, strict=True)
        return np.array([0.0 if text is None else max(compare(text, gold) for gold in golds) for text, golds in pairs])

    return scores


@functools.cache
def _sacrebleu(name: Literal["bleu", "chrf"]) -> Any:
    """Sacrebleu's metric with its default settings; `force` only silences a warning about tokenized text."""
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(force=True) if name == "bleu" else CHRF()


@functools.lru_cache(_CACHED_ROWS)
def _row_statistics(name: Literal["bleu", "chrf"], prediction: str, golds: tuple[str, ...]) -> Sequence[int]:
    return _sacrebleu(name)._extract_corpus_statistics([prediction], [[gold] for gold in golds])[0]


def _pooled(name: Literal["bleu", "chrf"]) -> Pooled:
    """A corpus metric of sacrebleu, through the two methods that its own bootstrap uses; no prediction is empty."""

    def statistics(answers: Answers) -> Int[np.ndarray, "row statistic"]:
        pairs = zip(answers.predictions, answers.golds, strict=True)
        return np.array([_row_statistics(name, text or "", tuple(golds)) for text, golds in pairs], dtype=np.int64)

    def score(statistics: Int[np.ndarray, "statistic"]) -> float:
        return float(_sacrebleu(name)._compute_score_from_stats(statistics.tolist()).score) / 100

    return Pooled(answer_kind="texts", statistics=statistics, score=score, package="sacrebleu")


METRICS: Mapping[str, Metric] = {
    "exact_match": RowMean(answer_kind="texts", scores=_exact(normalize)),
    "token_f1": RowMean(answer_kind="texts", scores=_overlap(normalize), zero_or_one=False),
    "squad_exact_match": RowMean(answer_kind="texts", scores=_exact(squad_normalize)),
    "squad_f1": RowMean(answer_kind="texts", scores=_overlap(squad_normalize), zero_or_one=False),
    "referent_match": RowMean(answer_kind="texts", scores=_best(referent_match)),
    "rouge_l": RowMean(answer_kind="texts", scores=_best(rouge_l), zero_or_one=False, package="rouge_score"),
    "chrf": _pooled("chrf"),
    "bleu": _pooled("bleu"),
}
"""The last three need the extra `text-metrics`; `chrf` and `bleu` are sacrebleu's corpus scores divided by 100."""
