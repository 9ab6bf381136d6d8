"""What a step of the embedded model's training draws: captions, their labels, references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.toybox.phases import Phase, PhasedRun
from train.toybox.redrawing import Redrawer
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.dit_data import Batch, ClipDraws
from train.toybox.tasks.mix import ConditionMix
from train.toybox.tasks.model_made import Settled
from train.toybox.tasks.toybox_data import (
    MARK_BINS,
    CacheConfig,
    ToyboxCache,
    encode,
    load_vae,
)
from train.toybox.world.cues import scene_marks
from train.toybox.world.render import render
from train.toybox.world.scenes import Actor, Scene
from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.diffusion.condition import reference_position
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.state import are_references
from vidgen.diffusion.temporal_upsampling import LatentRate, interpolated

PHASE = Phase(steps=40, num_frames=33, batch_size=8)
REFERENCES = ConditionMix(text=1, first=0, last=1, both=0, frames=0, prefix=0, mask=0)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DiTData:
    folder = tmp_path_factory.mktemp("draws")
    cache = CacheConfig(
        str(folder / "latents"), str(tiny_model / "vae"), 1, shard_size=12, height=32, width=32
    )
    ToyboxCache(cache).make(0, load_vae(cache.vae, torch.device("cpu")), torch.device("cpu"))
    return DiTData(
        run=PhasedRun(str(folder / "run"), phases=(PHASE,)), caches=(cache,),
        tokenizer=str(tiny_model / "tokenizer"), shifts=(1.0,), still_share=1.0,
        still_conditions=REFERENCES, caption_dropout=0.0, validation_clips=2,
    )


def draws(config: DiTData) -> list[Batch]:
    source = ClipDraws(config, torch.device("cpu"), patch=2)
    return [source.batch(PHASE, step, 0) for step in range(6)]


def has_reference(keys: KeyTokens | None, batch: int) -> torch.Tensor:
    """Which samples were given a reference image, [B] bool."""
    if keys is None:
        return torch.zeros(batch, dtype=torch.bool)
    given = are_references(keys)
    return (given if keys.valid is None else given & keys.valid).any(1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_loose_captions_change_nothing_else_that_is_drawn(plain: DiTData) -> None:
    pairs = list(zip(draws(plain), draws(replace(plain, loose_share=1.0)), strict=True))
    assert not any(same(a.ids, b.ids) for a, b in pairs)
    for a, b in pairs:
        assert same(a.noise, b.noise)
        assert same(a.sigma, b.sigma)
        assert same(a.state.denoise_mask, b.state.denoise_mask)
        assert all(same(a.labels[name], b.labels[name]) for name in a.labels)


def test_half_loose_is_half_of_the_captions(plain: DiTData) -> None:
    def first_tokens(share: float) -> list[torch.Tensor]:
        source = ClipDraws(replace(plain, loose_share=share), torch.device("cpu"), patch=2)
        ids, mask, _ = source.draws.captions(0, 200)
        return [row[kept] for row, kept in zip(ids, mask, strict=True)]

    none, half, every = (first_tokens(share) for share in (0.0, 0.5, 1.0))
    loose = [not same(a, b) for a, b in zip(none, every, strict=True)]
    mixed = [not same(a, b) for a, b in zip(none, half, strict=True)]
    assert 90 < sum(loose) < 130
    assert 0.35 * sum(loose) < sum(mixed) < 0.65 * sum(loose)
    for a, b, c in zip(none, half, every, strict=True):
        assert same(b, a) or same(b, c)


def test_only_what_a_reference_shows_goes_unnamed(plain: DiTData) -> None:
    nameless = replace(plain, anonymous_share=1.0)
    shown = hidden = 0
    for a, b in zip(draws(plain), draws(nameless), strict=True):
        given = has_reference(b.state.keys, len(b.ids))
        shown, hidden = shown + int((~given).sum()), hidden + int(given.sum())
        assert (a.labels["sprite"] >= 0).all()
        for name in b.labels:
            left_out = given if name in ("sprite", "tint") else torch.zeros_like(given)
            assert same(b.labels[name], a.labels[name].masked_fill(left_out, -1))
        for row in range(len(given)):
            kept, its = a.ids[row][a.mask[row]], b.ids[row][b.mask[row]]
            assert same(kept, its) != bool(given[row])
    assert min(shown, hidden) > 10


def test_tokens_name_what_caption_or_reference_tell_of(plain: DiTData) -> None:
    named = replace(plain, anonymous_share=1.0)
    silent = replace(plain, caption_dropout=1.0)
    found = 0
    for a, b, c in zip(draws(plain), draws(named), draws(silent), strict=True):
        alone = a.labels["sprite_2"] == 0
        assert same(a.shown, a.labels["sprite"].masked_fill(~alone, -1))
        assert same(b.shown, a.shown)  # the reference tells
        given = has_reference(c.state.keys, len(c.ids))
        assert same(c.shown, a.shown.masked_fill(~given, -1))  # nothing else does
        found += int((c.shown >= 0).sum())
    assert found > 10


def test_windows_of_a_clip_are_shown_its_first_frame(plain: DiTData) -> None:
    windows = replace(plain, window_share=1.0)
    assert all(batch.state.keys is None for batch in draws(windows))
    source = ClipDraws(replace(windows, anchor_share=1.0), torch.device("cpu"), patch=2)
    firsts = source.data[0].clips[:, :, :1].float()
    for step in range(6):
        state = source.batch(PHASE, step, 0).state
        keys = state.keys
        assert keys is not None
        assert (keys.positions == reference_position(0)).all()
        assert not state.denoise_mask[:, :, 0].any()  # goes on from what is known
        for row in range(PHASE.batch_size):
            mine = (firsts == keys.latents[row]).flatten(1).all(1)
            assert mine.sum() == 1
            assert not same(state.clean[row, :, :1], firsts[mine][0])  # from inside the clip


def test_what_windows_continue_from_may_be_noisy(plain: DiTData) -> None:
    windows = replace(plain, window_share=1.0)
    levels = []
    for clear, noisy in zip(
        draws(windows), draws(replace(windows, history_noise=0.5)), strict=True
    ):
        assert clear.state.known_sigma is None
        level, unknown = noisy.state.known_sigma, noisy.state.denoise_mask
        assert level is not None
        assert same(unknown, clear.state.denoise_mask)
        shown = torch.where(
            unknown, clear.state.clean, add_noise(clear.state.clean, noisy.noise, level)
        )
        assert same(noisy.state.clean, shown)
        levels.append(level)
    found = torch.cat(levels)
    assert 0 <= float(found.min()) < 0.1
    assert 0.4 < float(found.max()) <= 0.5
    whole = draws(replace(plain, history_noise=0.5))
    assert all(batch.state.known_sigma is None for batch in whole)


def test_marks_lie_where_the_scene_has_them(plain: DiTData) -> None:
    (batch, *_), cache = draws(replace(plain, still_share=0.0)), ToyboxCache(plain.caches[0])
    assert batch.marks is not None
    assert batch.marks.shape == (PHASE.batch_size, 9, MARK_BINS)
    bouncing = Scene(5, (Actor("car", "bounces"),), "room")
    marks = cache.marks([bouncing], 0, 9)[0]
    times = scene_marks(bouncing, 33, 32, 32, 12)
    assert len(times) >= 2
    assert int(marks.sum()) == len(times)
    for frame, part in marks.nonzero().tolist():  # latent frame f is shown from frame 4 f - 3 on
        begins = (4 * frame - 3 + 4 * part / MARK_BINS) / 12
        assert any(begins <= at < begins + 4 / MARK_BINS / 12 for at in times)
    assert same(cache.marks([bouncing], 2, 5)[0], marks[2:7])
    assert not cache.marks([Scene(5, (Actor("car", "stays"),), "room")], 0, 9).any()


def test_micro_batches_of_a_step_are_of_one_kind(plain: DiTData) -> None:
    mixed = replace(
        plain, image_shares=(0.5,), image_batch=4, window_share=0.5, still_share=0.5,
        still_conditions=replace(REFERENCES, text=0),
    )
    source = ClipDraws(mixed, torch.device("cpu"), patch=2)
    kinds = set()
    for step in range(24):
        pair = [source.batch(PHASE, step, micro) for micro in (0, 1)]
        a, b = ((part.noise.shape, part.state.keys is None) for part in pair)
        assert a == b
        assert not same(pair[0].noise, pair[1].noise)
        kinds.add(a)
    assert len(kinds) >= 4  # stills, whole clips, their insides, with stills beside them or not


def test_validation_stays_plain(plain: DiTData) -> None:
    loose = replace(plain, loose_share=1.0, anonymous_share=1.0)
    a, b = (ClipDraws(c, torch.device("cpu"), patch=2).held_aside(33, 0.5) for c in (plain, loose))
    assert same(a.ids, b.ids)
    assert all(same(a.labels[name], b.labels[name]) for name in a.labels)


@pytest.mark.parametrize("name", ["loose_share", "anonymous_share", "anchor_share",
                                  "history_noise", "handed_share"])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_lie_between_none_and_all(plain: DiTData, name: str, share: float) -> None:
    with pytest.raises(InputError, match=rf"{name} is {share}.*0\.\.1"):
        replace(plain, **{name: share})


def test_squares_show_sprites_for_the_same_number_of_tokens(plain: DiTData) -> None:
    image = {"image_shares": (0.5,), "image_batch": 6}
    whole = draws(replace(plain, **image))
    squares = draws(replace(plain, **image, crop_share=1.0, crop=2, crop_level=0.5))
    assert {batch.cover.shape[2] for batch in squares} == {1, 9}
    for batch in squares:
        latents = batch.state.clean
        size = 6 if latents.shape[2] == 1 else 8
        assert latents.shape[0] == size * 4
        assert latents.shape[3:] == batch.cover.shape[3:] == (2, 2)
        assert batch.sigma.max() <= 0.5 < whole[0].sigma.max()
        assert batch.state.keys is None
    stills = [[b.cover.flatten() for b in part if b.cover.shape[2] == 1]
              for part in (whole, squares)]
    share = [float(torch.cat(part).mean()) for part in stills]
    assert share[1] > 1.2 * share[0]
    with pytest.raises(InputError, match="crop is 6; give a multiple of 2 up to 4"):
        draws(replace(plain, crop_share=0.5, crop=6))


def test_an_expert_learns_the_noise_levels_of_its_own(plain: DiTData) -> None:
    image = {"image_shares": (0.5,), "image_batch": 6, "uniform_share": 0.5}
    low = replace(plain, **image, levels=(0.2, 0.6), shifts=(4.0,))
    for config in (low, replace(low, crop_share=1.0, crop=2, crop_level=0.7)):
        levels = torch.cat([batch.sigma for batch in draws(config)])
        assert 0.2 <= levels.min() < 0.3
        assert 0.5 < levels.max() <= 0.6
    for wrong in ((0.6, 0.2), (-0.1, 1.0), (0.5, 1.5)):
        with pytest.raises(InputError, match=r"levels are \[.*the lowest first"):
            replace(plain, levels=wrong)
    with pytest.raises(InputError, match=r"crop_level is 0\.2, levels begin at 0\.2.*crop_share 0"):
        replace(low, crop_share=0.5, crop_level=0.2)
    replace(low, crop_level=0.2)  # of no square


def with_stills(plain: DiTData, folder: Path) -> DiTData:
    """The same, with 120 stills beside its twelve clips; all scenes of them are others."""
    cache = replace(plain.caches[0], folder=str(folder), shard_size=30, first_scene=500,
                    stills_only=True)
    ToyboxCache(cache).make(0, load_vae(cache.vae, torch.device("cpu")), torch.device("cpu"))
    return replace(plain, caches=(*plain.caches, cache), image_batch=16)


def test_stills_alone_are_for_batches_of_single_frames(plain: DiTData, tmp_path: Path) -> None:
    both = with_stills(plain, tmp_path)
    for a, b in zip(draws(plain), draws(both), strict=True):
        assert same(a.state.clean, b.state.clean)  # clips are drawn as without them
    source = ClipDraws(replace(both, image_shares=(1.0,)), torch.device("cpu"), patch=2)
    alone = source.data[1]
    kept = torch.cat([alone.clips, alone.stills.latents[:, :, :2]], dim=2).float()
    kept = kept.transpose(1, 2).flatten(0, 1)
    mine = []
    for step in range(6):
        latents = source.batch(PHASE, step, 0).state.clean
        assert latents.shape[:3] == (16, kept.shape[1], 1)
        found = (latents.transpose(1, 2) == kept).flatten(2).all(2).any(1)
        mine.append(bool(found.all()))
        assert mine[-1] or not found.any()  # a batch has stills of one cache
    assert sum(mine) >= 3  # thirty of them to ten clips


@pytest.mark.long
def test_stills_are_taken_where_a_clip_is_under_way(plain: DiTData, tmp_path: Path) -> None:
    both = with_stills(plain, tmp_path)
    cache = ToyboxCache(both.caches[1])
    kept = cache.load()
    vae = load_vae(cache.config.vae, torch.device("cpu"))
    size = {"height": 32, "width": 32, "num_frames": 33, "fps": 12}
    shown = render([cache.scene(3)], frames=[8, 16, 24], **size).video
    with torch.no_grad():
        each = torch.cat([encode(vae, frame) for frame in shown.split(1, dim=2)], dim=2)
    latents = torch.cat([kept.clips[3:4], kept.stills.latents[3:4, :, :2]], dim=2).float()
    assert (latents - each).abs().max() < 0.05 * each.abs().max()  # another batch, float16
    assert kept.stills.frame_index[3].tolist() == [16, 24, -1]


def test_validation_needs_clips(plain: DiTData) -> None:
    alone = replace(plain.caches[0], stills_only=True)
    with pytest.raises(InputError, match="first of the caches is stills_only"):
        replace(plain, caches=(alone,))


@pytest.fixture(scope="module")
def handing(
    plain: DiTData, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> DiTData:
    """Clips at twice the frame rate, and what a model has settled of them, for its expert."""
    cache = replace(
        plain.caches[0], folder=str(tmp_path_factory.mktemp("finer")), num_frames=65, fps=24,
        settled=Settled(str(tiny_model), 0.875),
    )
    device = torch.device("cpu")
    redrawer = Redrawer(str(tiny_model), "cpu")
    ToyboxCache(cache).make(0, load_vae(cache.vae, device), device, redrawer)
    return replace(plain, caches=(cache,), levels=(0.02, 0.9), boundary=0.86, handed_share=0.5,
                   still_conditions=ConditionMix(text=0.5, first=0.5, last=0, both=0, frames=0,
                                                 prefix=0, mask=0, reference=0.3))


@pytest.mark.long
def test_some_clips_are_handed_over_as_they_were_settled(handing: DiTData) -> None:
    source = ClipDraws(handing, torch.device("cpu"), patch=2)
    settled = source.data[0].settled
    assert settled is not None
    assert settled.shape[2] == 9
    ours = interpolated(settled.float(), LatentRate(2), source.strides.t)
    handed, rows = {True: 0, False: 0}, set()
    for step in range(12):
        batch = source.batch(PHASE, step, 0)
        assert batch.begun is not None
        known = ~batch.state.denoise_mask[:, 0].flatten(2).any(2)  # [B, F]
        for row in range(len(batch.sigma)):
            begun, clean = batch.begun[row], batch.state.clean[row]
            is_handed = not torch.equal(begun, clean)
            handed[is_handed] += 1
            if is_handed:
                assert 0.8 <= batch.sigma[row] <= 0.86
                number = int((ours == begun).flatten(1).all(1).nonzero())
                assert known[row].tolist() == [number % 2 == 1, *[False] * 16]
                rows.add(number % 2)
                assert not has_reference(batch.state.keys, len(batch.sigma))[row]
    assert rows == {0, 1}
    assert 0.1 < handed[True] / sum(handed.values()) < 0.4


def test_windows_squares_and_stills_are_handed_over_by_nobody(handing: DiTData) -> None:
    for other in (
        replace(handing, window_share=1.0), replace(handing, handed_share=0.0),
        replace(handing, crop_share=1.0, crop=2, crop_level=0.5),
        replace(handing, image_shares=(1.0,)),
    ):
        assert all(batch.begun is None for batch in draws(other))


def test_clips_are_handed_over_at_low_noise_alone(handing: DiTData) -> None:
    with pytest.raises(InputError, match=r"handed_from is 0\.9; .*below its boundary, 0\.86"):
        replace(handing, handed_from=0.9)
    with pytest.raises(InputError, match=r"handed_from is 0\.8; .*handed_share 0"):
        replace(handing, levels=(0.0, 1.0), boundary=None)


@pytest.mark.parametrize(
    "weights", [{"first": -0.1}, {"text": float("nan")}, {"reference": 1.5}])
def test_nonsense_in_a_mix_is_refused(weights: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ConditionMix(**weights)
