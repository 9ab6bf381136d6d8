"""Telling things apart: whose each latent is, and what is then drawn there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidgen.core.protocols import Denoise
from vidgen.diffusion.regional_prompts import NO_LABEL, regions, with_regions
from vidgen.diffusion.state import new_state

FRAMES, SIDE = 6, 16


def blob(rows: Tensor, columns: Tensor) -> Tensor:
    """A thing four latents wide around a middle in each frame, [F, h, w]."""
    place = torch.arange(float(SIDE))
    down = (place[None, :, None] - rows[:, None, None]).abs() < 2
    across = (place[None, None] - columns[:, None, None]).abs() < 2
    return (down & across).float()


def at(row: float, column: float) -> Tensor:
    return blob(torch.full((FRAMES,), row), torch.full((FRAMES,), column))


def looks(*things: tuple[Tensor, float, float]) -> tuple[Tensor, Tensor]:
    """What is seen, and how much of it like the first and the second of two names."""
    something = torch.stack([thing for thing, _, _ in things]).amax(0)
    named = torch.stack([sum(thing * things_look[name] for thing, *things_look in things)
                         for name in (0, 1)])
    return something, named


def test_of_two_alike_the_one_that_looks_less_like_the_first_is_the_second() -> None:
    one, other = at(3.5, 8), at(11.5, 8)
    shares = regions(*looks((one, 0.9, 0.02), (other, 0.9, 0.01)))
    assert shares.shape == (2, FRAMES, SIDE, SIDE)
    assert float((shares[1] * one).sum() / one.sum()) > 0.98
    assert float((shares[0] * other).sum() / other.sum()) > 0.99
    assert float(shares[:, :, 7, :4].sum()) == 0  # where nothing is
    swapped = regions(*looks((one, 0.02, 0.9), (other, 0.01, 0.9)))
    assert torch.allclose(swapped, shares.flip(0), atol=1e-4)


def test_things_keep_their_names_while_they_move_and_what_is_seen_of_them_changes() -> None:
    way = torch.linspace(2, 13, FRAMES)
    one, other = blob(torch.full((FRAMES,), 3.0), way), blob(torch.full((FRAMES,), 12.0), 15 - way)
    clear = torch.tensor([0.9, 0.8, 0.05, 0.9, 0.9, 0.9]).view(-1, 1, 1)  # unsure in one frame
    something = torch.maximum(one, other)
    named = torch.stack([one * clear + other * 0.06, other * clear + one * 0.06])
    shares = regions(something, named)
    assert float((shares[0] * one).sum() / one.sum()) > 0.95
    assert float((shares[1] * other).sum() / other.sum()) > 0.95


def test_what_is_one_thing_or_none_is_not_distinguished() -> None:
    assert float(regions(*looks((at(8, 8), 0.5, 0.4))).sum()) == 0
    assert float(regions(*looks((torch.zeros(FRAMES, SIDE, SIDE), 0.5, 0.4))).sum()) == 0


def test_three_things_get_three_names_in_pictures_of_any_aspect() -> None:
    wide = torch.zeros(3, FRAMES, 12, 30)
    for number, column in enumerate((3, 14, 25)):
        wide[number, :, 4:8, column - 2 : column + 2] = 1
    first = wide[0] * 0.5 + wide[1] * 0.4
    shares = regions(
        wide.amax(0), torch.stack([first, wide[1] * 0.1, wide[2] * 0.1 + wide[0] * 0.05])
    )
    for number in range(3):
        assert float((shares[number] * wide[number]).sum() / wide[number].sum()) > 0.95


@pytest.fixture
def things() -> tuple[Tensor, Tensor]:
    return at(3.5, 8)[None, None], at(11.5, 8)[None, None]


def test_each_is_drawn_by_its_own_words_where_it_is(things: tuple[Tensor, Tensor]) -> None:
    one, other = things
    state = new_state(torch.zeros(2, 4, FRAMES, SIDE, SIDE))
    asked: list[str] = []

    def told(name: str, value: float) -> Denoise:
        def denoise(latents: Tensor, _sigma: Tensor) -> Tensor:
            asked.append(name)
            return torch.full_like(latents, value)

        return denoise

    def where(guess: Tensor) -> Tensor:
        assert torch.equal(guess, torch.full_like(guess, 1 - 0.5 * 3.0))  # x - sigma * v
        seen = torch.cat([one * 0.9, one * 0.05, other * 0.9, 1 - one - other], dim=1)
        return seen.expand(2, -1, -1, -1, -1)

    labels = torch.tensor([[0, 2], [0, NO_LABEL]])
    model = with_regions(told("all", 3.0), [told("one", 5.0), told("other", 7.0)],
                         where, state, labels,
                  strength=1.0, legible=0.85)
    latents = torch.ones(2, 4, FRAMES, SIDE, SIDE)
    made = model(latents, torch.full((2,), 0.5))
    assert asked == ["all", "one", "other"]
    assert torch.allclose(made[0, 0, :, 3, 8], torch.tensor(5.0), atol=0.01)
    assert torch.allclose(made[0, 0, :, 12, 8], torch.tensor(7.0), atol=0.01)
    assert bool((made[0, :, :, :, :3] == 3.0).all())  # where nothing is
    assert bool((made[1] == 3.0).all())  # told of one thing
    asked.clear()
    assert bool((model(latents, torch.full((2,), 0.9)) == 3.0).all())  # nothing to be seen yet
    assert asked == ["all"]
    half = with_regions(told("all", 3.0), [told("one", 5.0), told("other", 7.0)],
                        where, state, labels, strength=0.5, legible=0.85)
    made = half(latents, torch.full((2,), 0.5))
    assert torch.allclose(made[0, 0, :, 3, 8], torch.tensor(4.0), atol=0.01)
