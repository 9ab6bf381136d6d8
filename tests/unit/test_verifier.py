"""A verifier's reading of prompts, and what it makes of what it sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from train.toybox.world.captions import caption, nouns
from train.toybox.world.cast import SPRITE_NAMES, SPRITES
from train.toybox.world.scenes import SEED_RANGES, TINTS, SceneMix, sample_scenes
from vidgen.models.verifier import (
    ANY,
    LIKELY,
    Answers,
    Verifier,
    VerifierConfig,
    Want,
    score,
)

CONFIG = VerifierConfig(
    (("cat", "kitty"), ("ball", "soccer ball"), ("ice cream", "ice cream cone"), ("cone",)),
    latent_channels=3, dim=8, num_blocks=1,
)
TINTED = replace(CONFIG, tints=(("red",), ("blue", "azure")))


@pytest.mark.parametrize(("prompt", "labels"), [
    ("A cat chases a soccer ball", {0, 1}),
    ("KITTY! On the catwalk.", {0}),
    ("an ice cream cone rises", {2}),
    ("an ice cream beside a cone", {2, 3}),
    ("a cat bounces like a ball, over a cone", {0, 3}),
    ("a cat hops as if it were a ball; without a cone", {0}),
    ("a dog in the snow", set()),
    ("", set()),
])
def test_a_prompt_names_what_it_says_is_there(prompt: str, labels: set[int]) -> None:
    assert CONFIG.labels_in(prompt) == labels


@pytest.mark.parametrize(("prompt", "wants"), [
    ("A red cat chases the little AZURE soccer ball", {Want(0, 0), Want(1, 1)}),
    ("a ball, in blue light; the red and blue cat", {Want(1), Want(0)}),
    ("a blue house, a cat", {Want(0)}),
    ("Red cat chases azure ball", {Want(0, 0), Want(1, 1)}),
    ("painted red, cat on blue. Ball", {Want(0), Want(1)}),
    ("the red cat meets a cat", {Want(0, 0), Want(0)}),
    ("a red cat bounces like a blue ball", {Want(0, 0)}),
])
def test_a_prompt_gives_things_tints(prompt: str, wants: set[Want]) -> None:
    assert TINTED.wants_in(prompt) == wants
    assert CONFIG.wants_in(prompt) == {Want(label) for label, _ in wants}


def test_what_is_wanted_has_names_for_people() -> None:
    assert TINTED.names({Want(1), Want(0, 1)}) == "blue cat and ball"
    assert TINTED.names({Want(2)}) == "ice cream"


def test_all_captions_of_the_world_give_their_tints() -> None:
    known = VerifierConfig(tuple(map(nouns, SPRITE_NAMES)), tuple((tint,) for tint in TINTS))
    mix = SceneMix(two_actors=0.5, tint=0.5)
    for scene in sample_scenes(SEED_RANGES["train"][0], 200, mix):
        text = caption(scene, scene.seed, detail="full")
        wants = known.wants_in(text)
        for actor in scene.actors:
            label = SPRITE_NAMES.index(actor.sprite)
            told = {tint for number, tint in wants if number == label}
            own = {TINTS.index(colour) for colour in [SPRITES[actor.sprite].color]
                   if colour in TINTS} | {ANY}
            assert told <= ({TINTS.index(actor.tint)} if actor.tint else own), text


def test_all_captions_of_the_world_name_their_sprites() -> None:
    known = VerifierConfig(tuple(map(nouns, SPRITE_NAMES)))
    first = SEED_RANGES["train"][0]
    for scene in sample_scenes(first, 300, SceneMix(two_actors=0.5)):
        shown = {SPRITE_NAMES.index(actor.sprite) for actor in scene.actors}
        for seed in range(3):
            assert known.labels_in(caption(scene, seed)) == shown


@pytest.mark.parametrize(("prompt", "told"), [
    ("A red cat chases the little soccer ball", {
        0: "A red cat chases a red cat", 1: "the little soccer ball chases the little soccer ball",
    }),
    ("in the house a fat cat, cone beside it", {
        0: "in the house a fat cat, a fat cat beside it", 3: "in the house cone, cone beside it",
    }),
    ("a cat above a cone; the cat hops like a ball", {
        0: "a cat above a cat; the cat hops like a ball",
        3: "a cone above a cone; a cone hops like a ball",
    }),
    ("CAT and <my-cat> CONE", {0: "CAT and <my-cat> cAT", 3: "cONE and <my-cat> CONE"}),
    ("one big cat", {0: "one big cat"}),
    ("snow", {}),
])
def test_each_thing_is_described_alone(
    prompt: str, told: dict[int, str]
) -> None:
    assert CONFIG.prompts_of_each(prompt) == told


def test_how_each_thing_looks_is_described_twice() -> None:
    assert CONFIG.looks_of_each("A red cat chases the little soccer ball; the cat hops") == {
        0: "a red cat and a red cat", 1: "the little soccer ball and the little soccer ball",
    }
    assert CONFIG.looks_of_each("CAT on snow") == {0: "cAT and cAT"}
    assert CONFIG.looks_of_each("snow") == {}
    assert TINTED.looks_of_each("Red cat meets ball") == {
        0: "red cat and red cat", 1: "ball and ball",
    }


def test_no_label_is_found_without_any() -> None:
    assert VerifierConfig().labels_in("a cat") == frozenset()


def sure(classes: torch.Tensor, count: int) -> torch.Tensor:
    """Logits [N, count, h, w] of classes [N, h, w]."""
    return 50 * torch.nn.functional.one_hot(classes.long() % count, count).movedim(3, 1).float()


def test_what_latents_show_is_counted_and_what_they_show_together_is_scored() -> None:
    verifier = Verifier(CONFIG).eval()

    def logits(frames: torch.Tensor) -> Answers:
        """Latents whose first channel says what they show, -1 nothing."""
        return Answers(sure(frames[:, 0], 5), None)

    verifier.forward = logits  # type: ignore[method-assign]
    latents = torch.full((2, 3, 4, 6, 6), 4.0)
    latents[0, :, :, :2, :2] = 0.0  # four latents of a cat, in all frames
    latents[0, :, :3, 4:, 4:] = 1.0  # and of a ball, in three of four
    shown = verifier.shown(latents)
    assert shown.shape == (2, 4, 4, 1)
    most = float(1 - torch.exp(torch.tensor(-2.0)))
    assert shown[0, :, 0, ANY].tolist() == pytest.approx([most] * 4, abs=1e-4)
    assert shown[0, :, 1, ANY].tolist() == pytest.approx([most] * 3 + [0], abs=1e-4)
    assert float(shown[1].abs().max()) < 1e-4
    cat, ball, ice = Want(0), Want(1), Want(2)
    assert score(shown[0], {cat}) == pytest.approx(most, abs=1e-4)
    assert score(shown[0], {cat, ball}) == pytest.approx(most, abs=1e-4), "three of four frames"
    assert score(shown[0, 1:], {cat, ball}) == pytest.approx(2 / 3 * most, abs=1e-4)
    assert score(shown[0], {cat, ball, ice}) == pytest.approx(0, abs=1e-4)


def test_things_are_shown_in_the_tints_that_most_of_them_have() -> None:
    verifier = Verifier(TINTED).eval()

    def logits(frames: torch.Tensor) -> Answers:
        """The second channel says in which tint."""
        return Answers(sure(frames[:, 0], 5), sure(frames[:, 1], 3))

    verifier.forward = logits  # type: ignore[method-assign]
    latents = torch.full((1, 3, 2, 6, 6), 4.0)
    latents[0, 0, :, :2, :2] = 0.0  # a cat
    latents[0, 1, 0] = 0.0  # all is red
    latents[0, 1, 1] = 2.0  # all is of its own colours
    latents[0, 1, 1, 0, 0] = 1.0  # but for a quarter of the cat, which is blue
    shown = verifier.shown(latents)
    assert shown.shape == (1, 2, 4, 3)
    most = float(1 - torch.exp(torch.tensor(-2.0)))
    assert shown[0, 0, 0].tolist() == pytest.approx([most, 0, most], abs=1e-4)
    assert shown[0, 1, 0].tolist() == pytest.approx([0, 0.25 / LIKELY * most, most], abs=1e-4)
    assert score(shown[0, :1], {Want(0, 0)}) == pytest.approx(most, abs=1e-4)
    assert score(shown[0, :1], {Want(0, 1)}) == pytest.approx(0, abs=1e-4)
    assert torch.isfinite(shown).all()


def test_a_verifier_looks_at_each_frame_by_itself() -> None:
    torch.manual_seed(0)
    verifier = Verifier(CONFIG).eval()
    latents = torch.randn(2, 3, 5, 6, 6)
    whole = verifier.shown(latents)
    assert torch.allclose(whole[1:, 2:3], verifier.shown(latents[1:, :, 2:3]), atol=1e-6)
    names, tints = verifier(latents[0].transpose(0, 1))
    assert names.shape == (5, 5, 6, 6)
    assert tints is None
    assert Verifier(TINTED).eval()(latents[0].transpose(0, 1)).tints.shape == (5, 3, 6, 6)
