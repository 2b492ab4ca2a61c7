"""A folded prompt for any shapes: its tables are looked up row by row, and it is its own fold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.prompts import Folded

sizes = st.integers(1, 6)
shapes = st.fixed_dictionaries(
    {"batch": sizes, "seq": st.integers(0, 6), "dim": sizes, "length": sizes, "places": sizes, "vocab": sizes}
)


def draw(shape: dict[str, int], seed: int, furthest: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    batch, seq, dim = shape["batch"], shape["seq"], shape["dim"]
    matrix = torch.randn(shape["length"], dim, generator=generator)
    by_position = torch.randn(shape["places"], dim, generator=generator)
    by_id = torch.randn(shape["vocab"], dim, generator=generator)
    embeds = torch.randn(batch, seq, dim, generator=generator)
    ids = torch.randint(shape["vocab"], (batch, seq), generator=generator)
    positions = torch.randint(furthest, (batch, seq), generator=generator)
    return matrix, by_position, by_id, embeds, ids, positions


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32), use_position=st.booleans(), use_id=st.booleans())
def test_shift_adds_each_tokens_rows(shape: dict[str, int], seed: int, use_position: bool, use_id: bool) -> None:
    matrix, by_position, by_id, embeds, ids, positions = draw(shape, seed, 2 * shape["places"])
    folded = Folded(matrix, by_position if use_position else None, by_id if use_id else None)
    shifted = folded.shift(embeds, ids, positions)
    for row in range(shape["batch"]):
        for place in range(shape["seq"]):
            wanted = embeds[row, place]
            at = int(positions[row, place])
            if use_position and at < shape["places"]:
                wanted = wanted + by_position[at]
            if use_id:
                wanted = wanted + by_id[int(ids[row, place])]
            assert torch.equal(shifted[row, place], wanted)
    assert folded.plain == (not use_position and not use_id)
    assert torch.equal(folded.prompt(), matrix)
    assert folded.fold() is folded
    assert folded.groups() == {}


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_refuse_refuses_exactly_what_lies_beyond(shape: dict[str, int], seed: int) -> None:
    matrix, by_position, _, embeds, ids, positions = draw(shape, seed, shape["places"] + 1)
    strict, lenient = (Folded(matrix, by_position, beyond=beyond) for beyond in ("refuse", "none"))
    assert (strict.max_input_length, lenient.max_input_length) == (shape["places"], None)
    if bool((positions >= shape["places"]).any()):
        with pytest.raises(ValueError, match=f"has offsets for {shape['places']};"):
            strict.shift(embeds, ids, positions)
    else:
        assert torch.equal(strict.shift(embeds, ids, positions), lenient.shift(embeds, ids, positions))


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_a_padded_position_moves_no_other_token(shape: dict[str, int], seed: int) -> None:
    matrix, by_position, by_id, embeds, ids, positions = draw(shape, seed, shape["places"])
    folded = Folded(matrix, by_position, by_id, beyond="refuse")
    padded = folded.shift(
        torch.cat([torch.zeros_like(embeds), embeds], 1),
        torch.cat([torch.zeros_like(ids), ids], 1),
        torch.cat([torch.zeros_like(positions), positions], 1),
    )
    assert torch.equal(padded[:, shape["seq"] :], folded.shift(embeds, ids, positions))


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_tables_survive_their_state(shape: dict[str, int], seed: int) -> None:
    matrix, by_position, by_id, embeds, ids, positions = draw(shape, seed, 2 * shape["places"])
    folded = Folded(matrix, by_position, by_id)
    again = Folded(torch.zeros_like(matrix), torch.zeros_like(by_position), torch.zeros_like(by_id))
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again.prompt(), folded.prompt())
    assert torch.equal(again.shift(embeds, ids, positions), folded.shift(embeds, ids, positions))
