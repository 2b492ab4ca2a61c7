"""Concatenated prompts are the plain concatenation of their matrices and the composition of their shifts."""

import pytest
import torch
from torch.testing import assert_close

from softprompt.prompts import METHODS, Folded, Host
from softprompt.prompts.concatenation import Concatenation
from softprompt.prompts.dpt import DPT


@pytest.fixture
def host() -> Host:
    return Host(embedding=torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), encode=lambda text: [1])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_part_behind_a_folded_one_trains_and_folds(name: str, host: Host) -> None:
    generator = torch.Generator().manual_seed(1)
    part = METHODS[name](length=10).build(host, generator)
    fixed = Folded(torch.randn(4, 12, generator=generator))
    both = Concatenation([fixed, part])
    assert_close(both.prompt(), torch.cat([fixed.matrix, part.prompt()]))
    assert {id(p) for group in both.groups().values() for p in group} == {id(p) for p in part.parameters()}
    ids = torch.randint(0, 40, (2, 5), generator=generator)
    embeds, positions = host.embedding[ids], torch.arange(5).expand(2, -1)
    assert_close(both.shift(embeds, ids, positions), part.shift(embeds, ids, positions))
    assert_close(both.fold().shift(embeds, ids, positions), both.shift(embeds, ids, positions))


def test_two_parts_share_one_group(host: Host) -> None:
    parts = [DPT(length=10).build(host, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert len(Concatenation(parts).groups()["prompt"]) == 4


def test_two_tables_are_not_folded_into_one() -> None:
    table = torch.ones(3, 12)
    both = Concatenation([Folded(torch.zeros(1, 12), position_table=table) for _ in range(2)])
    with pytest.raises(ValueError, match="only one of them can be folded"):
        both.fold()


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompts to concatenate"):
        Concatenation([])
