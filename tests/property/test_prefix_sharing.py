"""Every text is in one group, after its prefix, and no prefix is shared that does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from softprompt.evaluation.prefix_sharing import (
    MAX_PREFIX_TOKENS,
    MIN_SAVING,
    _shared_prefixes,
    plan_prefix_groups,
    shared_prefix,
)

Texts = list[tuple[int, ...]]
PASSAGES = st.lists(st.integers(0, 2), max_size=400)
"""Of few different tokens, so that texts drawn separately share prefixes too."""


@st.composite
def drawn_texts(draw: st.DrawFn) -> Texts:
    passages = draw(st.lists(PASSAGES, min_size=1, max_size=5))
    ending = st.tuples(st.integers(0, 4), st.lists(st.integers(0, 9), min_size=1, max_size=5))
    endings = draw(st.lists(ending, max_size=60))
    return [(*passages[passage % len(passages)], *tokens) for passage, tokens in endings]


@given(texts=drawn_texts(), batch=st.integers(1, 40), share=st.booleans())
def test_plan_prefix_groups_saves_tokens_within_limits(texts: Texts, batch: int, share: bool) -> None:
    groups = plan_prefix_groups(texts, batch, share=share)
    assert sorted(text for group in groups for text, _ in group.texts) == list(range(len(texts)))
    for group in groups:
        for text, index in group.texts:
            prefix = group.prefixes[index]
            assert texts[text][: len(prefix)] == prefix
            assert len(texts[text]) > len(prefix)
        if not any(group.prefixes):
            assert len(group.texts) <= batch
            continue
        assert share
        assert all(group.prefixes)
        full = sum(len(texts[text]) for text, _ in group.texts)
        after_prefix = sum(len(texts[text]) - len(group.prefixes[index]) for text, index in group.texts)
        assert full - after_prefix - sum(map(len, group.prefixes)) >= MIN_SAVING
        if len(group.prefixes) > 1:
            longest = max(map(len, group.prefixes))
            assert len(group.prefixes) * longest <= MAX_PREFIX_TOKENS
            assert 2 * min(map(len, group.prefixes)) >= longest
            assert len(group.texts) <= batch


@given(texts=drawn_texts())
def test_shared_prefix_is_common_and_pays(texts: Texts) -> None:
    prefix = shared_prefix(texts)
    assert all(text[: len(prefix)] == prefix and len(text) > len(prefix) for text in texts)
    assert not prefix or len(prefix) * (len(texts) - 1) >= MIN_SAVING


def best_saving(texts: Texts, depth: int = 0) -> int:
    """The most tokens that groups of these texts, which share `depth` tokens, can save; each text keeps one token."""
    branches: dict[int, Texts] = {}
    for text in texts:
        if len(text) > depth + 1:
            branches.setdefault(text[depth], []).append(text)
    in_branches = sum(best_saving(branch, depth + 1) for branch in branches.values() if len(branch) > 1)
    return max(depth * (len(texts) - 1), in_branches)


@given(texts=drawn_texts())
def test_shared_prefixes_save_the_most_tokens(texts: Texts) -> None:
    groups = _shared_prefixes(texts)
    grouped = [text for _, members in groups for text in members]
    assert len(grouped) == len(set(grouped))
    for length, members in groups:
        assert len(members) > 1
        assert len({texts[text][:length] for text in members}) == 1
        assert min(len(texts[text]) for text in members) > length
    assert sum(length * (len(members) - 1) for length, members in groups) == best_saving(texts)


def test_plan_prefix_groups_computes_each_passage_once() -> None:
    """Although all begin with one token, one passage has a single question, and one has more than a batch."""
    passages = [(1, *(2 + passage,) * 300) for passage in range(4)]
    passage_of_question = [0, *[1] * 50, *[2] * 3, *[3] * 4]
    texts = [(*passages[passage], question) for question, passage in enumerate(passage_of_question)]
    groups = plan_prefix_groups(texts, 32)
    assert sum(len(prefix) for group in groups for prefix in group.prefixes) == 903
    assert [len(group.texts) for group in groups] in ([50, 7, 1], [7, 50, 1])


def test_plan_prefix_groups_fills_batches() -> None:
    """Seven passages with five questions each are 30 and 5 rows, not 32 and 3; a much longer passage runs alone."""
    texts = [(passage,) * 100 + (question,) for passage in range(7) for question in range(5)]
    assert [len(group.texts) for group in plan_prefix_groups(texts, 32)] == [30, 5]
    longer = [(9,) * 900 + (question,) for question in range(5)]
    assert [len(group.texts) for group in plan_prefix_groups(texts + longer, 32)] == [5, 30, 5]


def test_shared_prefix_of_an_instruction() -> None:
    instruction = tuple(range(20))
    assert shared_prefix([(*instruction, text) for text in range(11)]) == instruction
    assert shared_prefix([(*instruction, text) for text in range(10)]) == (), "180 tokens saved do not pay"
    assert shared_prefix([]) == ()
