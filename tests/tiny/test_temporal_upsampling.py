"""Clips whose low-noise expert draws at twice the rate that they are shown at."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import add_low_expert, build_tiny_model
from tests.stopping import noting, stop_at
from vidgen.core.errors import Cancelled, InputError
from vidgen.core.protocols import KeyTokens, OnStep, SamplerState, StepInfo
from vidgen.core.request import Request
from vidgen.core.shapes import Strides
from vidgen.diffusion.condition import keyframe, prefix, reference
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.samplers import sample
from vidgen.diffusion.state import LatentState, new_state
from vidgen.diffusion.temporal_upsampling import (
    LatentRate,
    finished_upsampled,
    sample_upsampled,
    upsampled_state,
)
from vidgen.media.clip import Clip
from vidgen.media.types import ClipInfo
from vidgen.pipeline import denoise as networks
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.memory import count_passes, estimate
from vidgen.pipeline.plan import settle
from vidgen.pipeline.types import Setup

STRIDES = Strides(4, 8)
PROMPT = "a red car bounces"
GIVEN = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A model with sound whose second expert draws two latent frames for one."""
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "finer", sound=True)
    return finer(add_low_expert(folder, 0.9))


def finer(folder: Path) -> Engine:
    engine = load(str(folder), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    defaults = replace(engine.folder.defaults, settings={"temporal_upsampling": 2}, num_steps=4)
    engine.folder = replace(engine.folder, defaults=defaults)
    return engine


def made(engine: Engine, **options: Any) -> Clip:
    clip = engine.generate(PROMPT, **({"seed": 1, "audio": "none"} | options))
    assert isinstance(clip, Clip)
    return clip


def a_state(frames: int = 3, seed: int = 0) -> Any:
    return new_state(torch.randn(1, 4, frames, 2, 2, generator=torch.manual_seed(seed)))


def test_finer_frames_lie_where_their_pictures_do() -> None:
    """Latents that tell the time of their centre tell it of finer frames, too."""
    t, factor = 4, 2
    centres = torch.tensor([0.0, *(t * k - (t - 1) / 2 for k in (1, 2))])  # frames 0, 1-4, 5-8
    settled = centres.view(1, 1, 3, 1, 1).expand(1, 4, 3, 2, 2)
    found = upsampled_state(a_state(), settled, 0.0, factor, t).latents[0, 0, :, 0, 0]
    finer_centres = [0.0, *((t * k - (t - 1) / 2) / factor for k in (1, 2, 3, 4))]
    expected = torch.tensor(finer_centres).clamp(max=float(centres[-1]))
    inside = slice(2, 4)  # the first latent frame's one picture isn't as far from the next
    assert torch.allclose(found[inside], expected[inside])
    assert found[0] == 0
    assert (found.diff() > 0).all()


def test_conditions_stand_where_they_stood() -> None:
    still = torch.randn(1, 4, 1, 2, 2)
    state = reference(keyframe(prefix(a_state(), still), 2 * still, 6, STRIDES), 3 * still)
    settled = torch.randn(1, 4, 3, 2, 2)
    there = upsampled_state(state, settled, 0.5, 2, STRIDES.t)
    assert there.latents.shape[2] == 5
    assert there.denoise_mask.flatten().tolist()[::4] == [False, True, True, True, True]
    assert torch.equal(there.project(there.latents)[:, :, :1], still)
    assert there.times is not None
    assert there.times.tolist() == [0, 0.5, 1, 1.5, 2]
    # as in a clip of its own at twice the rate, where frame 6 is frame 12
    fine = keyframe(a_state(5), still, 12, STRIDES).keys
    keys = there.timed_keys
    assert isinstance(keys, KeyTokens)
    assert isinstance(fine, KeyTokens)
    assert keys.positions[0, 0] == fine.positions[0, 0] * 0.5
    assert keys.positions[0, 1] == state.keys.positions[0, 1]
    assert torch.equal(
        there.latents, add_noise(upsampled_state(state, settled, 0.0, 2, 4).latents,
                                 there.starting_noise, 0.5))


def test_finer_noise_is_like_noise_and_none_of_it_twice() -> None:
    state = new_state(torch.randn(2, 8, 9, 8, 8, generator=torch.manual_seed(1)))
    noise = upsampled_state(state, torch.zeros(2, 8, 9, 8, 8), 1.0, 2, 4).starting_noise
    assert noise.shape == (2, 8, 17, 8, 8)
    frames = torch.cat([noise, state.latents], dim=2).transpose(1, 2).flatten(2)
    alike = torch.corrcoef(frames[0]) - torch.eye(26)
    assert alike.abs().max() < 0.2
    assert abs(float(noise.std()) - 1) < 0.02
    shorter = new_state(state.latents[:, :, :5])
    again = upsampled_state(shorter, torch.zeros(2, 8, 5, 8, 8), 1.0, 2, 4).starting_noise
    assert torch.equal(again, noise[:, :, :9])


def test_a_finished_picture_is_shown_where_the_middles_of_its_frames_lie() -> None:
    """Those of a clip at the rate that is shown lie at whole numbers, but for the single frame."""
    shown = torch.zeros(1, 4, 4, 2, 2)
    times = finished_upsampled(shown, LatentRate(2, alone=False), 4).times
    assert times is not None
    assert times.tolist() == [-0.3125, 0.1875, 0.6875, 1.1875]
    middles = [(4 * n + 2.5) / 2 for n in range(4)]  # fine frames 1 to 4 are shown from 0.5 to 2 on
    own = [1 + 1.5 + 4 * n for n in (0, 1)]  # frames 1 to 4, 5 to 8
    assert [(m - own[0]) / 4 for m in middles] == times.tolist()
    plain = finished_upsampled(shown, LatentRate(1), 4)
    assert plain.times is None
    assert plain.is_known


def test_listening_to_a_finer_picture_gives_what_passing_both_gives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    listened = made(engine, audio="generate").sound
    monkeypatch.setattr(
        networks, "_listener", lambda *given: networks._denoiser(*given, None, None)
    )
    both = made(engine, audio="generate").sound
    assert listened is not None
    assert np.abs(listened).max() > 0.01
    assert np.abs(listened - both).max() < 1e-4 * np.abs(both).max()


def test_steps_count_through_and_continue_from_any() -> None:
    told: list[StepInfo] = []
    sigmas, state = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]), a_state()

    def run(
        state: LatentState, sigmas: Tensor, on_step: OnStep | None, resume: SamplerState | None
    ) -> Tensor:
        return sample(
            "euler", lambda latents, sigma: latents * sigma.view(-1, 1, 1, 1, 1), state.begin(),
            sigmas, fresh=state.fresh, on_step=on_step, project=state.project, resume=resume,
        )

    whole = sample_upsampled(run, state, sigmas, 2, 2, 4, on_step=told.append)
    assert whole.shape[2] == 5
    assert [(info.step, info.num_steps) for info in told] == [(n, 4) for n in (1, 2, 3, 4)]
    assert [info.sigma_next for info in told] == sigmas[1:].tolist()
    assert [info.denoised.shape[2] for info in told] == [3, 3, 5, 5]
    for info in told[:-1]:
        again = sample_upsampled(run, state, sigmas, 2, 2, 4, resume=info.state)
        assert torch.equal(again, whole)


def test_a_clip_is_as_long_as_any(engine: Engine) -> None:
    clip, plain = made(engine), made(engine, settings={"temporal_upsampling": 1})
    assert clip.latents is not None
    assert clip.latents.shape[2] == 2 * plain.latents.shape[2] - 1
    assert clip.frames.shape == plain.frames.shape
    assert clip.recipe["plan"]["temporal_upsampling"] == 2
    assert clip.recipe["plan"]["latents"] == plain.recipe["plan"]["latents"]
    whole = torch.cat(list(engine.decode_video(clip.latents, rate=2)), dim=2)[0]
    shown = ((whole.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert (clip.frames == shown).all()
    assert (clip.frames[1:] != plain.frames[1:]).any()


def test_given_frames_are_kept(engine: Engine) -> None:
    clip = made(engine, image=GIVEN, last_image=GIVEN)
    plain = made(engine, image=GIVEN, last_image=GIVEN, settings={"temporal_upsampling": 1})
    assert clip.recipe["plan"]["temporal_upsampling"] == 2
    assert (clip.frames[0] == plain.frames[0]).all()


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("sampler", ["euler", "unipc", "ancestral"])
def test_stopped_between_steps_it_goes_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, sampler: str
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    whole = made(engine, sampler=sampler).frames

    out = tmp_path / "x.mp4"
    with pytest.raises(Cancelled):
        made(engine, sampler=sampler, journal=Journal(out), on_event=stop_at(step))
    steps: list[int] = []
    again = made(engine, sampler=sampler, journal=Journal(out, resume=True),
                 on_event=noting(steps))
    assert (again.frames == whole).all()
    assert step not in steps


def a_video(path: Path, num_frames: int = 17) -> Path:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (num_frames, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    info = ClipInfo(Fraction(12), (32, 32), num_frames)
    Clip(lambda start=0: iter([frames[start:]]), info).save(path)
    return path


HALF = np.zeros((32, 32, 3), np.uint8)
HALF[:, 16:] = 255


def test_a_clip_to_edit_is_given_at_the_rate_that_is_drawn(engine: Engine, tmp_path: Path) -> None:
    given = a_video(tmp_path / "given.mkv")
    untouched = made(engine, video=given, strength=0.0)
    assert untouched.recipe["plan"]["temporal_upsampling"] == 2
    assert untouched.latents is not None
    assert untouched.latents.shape[2] == 9
    video = torch.from_numpy(Clip.from_file(given).frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    encoded = engine.encode_video(video, rate=2)
    torch.testing.assert_close(untouched.latents, encoded.cpu(), rtol=0, atol=1e-4)
    plain = made(engine, video=given, strength=0.0, settings={"temporal_upsampling": 1})
    assert plain.latents is not None
    assert plain.latents.shape[2] == 5
    changed = [made(engine, video=given, strength=s).latents for s in (0.25, 0.75, 1.0)]
    off = [float((latents - encoded).square().mean()) for latents in changed if latents is not None]
    assert all(share > 1e-3 for share in off)
    assert torch.equal(changed[2], made(engine, frames=17).latents)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_clip_that_is_edited_continues_between_steps(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    """Behind the first of eight steps; the lower strength begins below the boundary."""
    monkeypatch.setattr(journal, "PATIENCE", 0)
    options = {"video": a_video(tmp_path / "given.mkv"), "strength": strength, "steps": 8}
    whole = made(engine, **options).frames

    out = tmp_path / "x.mp4"
    with pytest.raises(Cancelled):
        made(engine, **options, journal=Journal(out), on_event=stop_at(1))
    again = made(engine, **options, journal=Journal(out, resume=True))
    assert (again.frames == whole).all()


@pytest.mark.parametrize("begins", [False, True])
def test_what_a_mask_keeps_is_kept_at_the_rate_that_is_drawn(
    engine: Engine, tmp_path: Path, begins: bool
) -> None:
    given = a_video(tmp_path / "given.mkv")
    stills = {"frame": [(0.0, GIVEN)]} if begins else {}
    clip = made(engine, video=given, mask=HALF, **stills)
    assert clip.recipe["plan"]["temporal_upsampling"] == 2
    kept = made(engine, video=given, strength=0.0)
    assert clip.latents is not None
    assert kept.latents is not None
    same = (clip.latents == kept.latents).all(1)[0]
    assert same[begins:, :, :2].all()
    assert not same[:, :, 2:].any()
    assert same[0, :, :2].any() != begins
    if begins:
        first = made(engine, image=GIVEN).latents
        assert first is not None
        assert torch.equal(clip.latents[:, :, 0], first[:, :, 0])


def test_what_is_encoded_is_counted(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[int, int]] = []
    encode = engine.encode_video

    def count(video: Tensor, tiles: Any = None, passes: int = 1, rate: int = 1) -> Tensor:
        encoded.append((video.shape[2], rate))
        return encode(video, tiles, passes, rate)

    monkeypatch.setattr(engine, "encode_video", count)
    given, longer = a_video(tmp_path / "given.mkv"), a_video(tmp_path / "longer.mkv", 30)
    for options in (
        {"video": given, "strength": 0.9}, {"video": given, "strength": 0.2},
        {"video": given, "mask": HALF, "reference": [GIVEN]},
        {"frames": 41}, {"prefix": longer, "frames": 41},
    ):
        encoded.clear()
        request, inputs = engine.read(
            Request.of(PROMPT, {"seed": 1, "audio": "none", "settings": {"overlap": 2}, **options})
        )
        counted = count_passes(engine.folder, engine.plan(request, inputs), request)
        made(engine, settings={"overlap": 2}, **options)
        assert sorted(counted.encoded) == sorted(encoded)
        if "strength" in options:  # begun below the boundary, a clip has one rate, which is drawn
            rates = {rate for _, rate in encoded}
            assert rates == ({2} if options["strength"] == 0.2 else {1, 2})


def test_it_sounds_and_is_seen_while_it_forms(engine: Engine) -> None:
    seen: list[int] = []
    clip = made(engine, audio="generate", on_preview=lambda p: seen.append(len(p.frames)))
    assert clip.sound is not None
    assert np.abs(clip.sound).max() > 0
    assert seen
    assert set(seen) == {3}


def test_a_long_clip_is_drawn_finer_window_by_window(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    whole = made(engine, frames=41)
    assert whole.latents is not None
    assert whole.latents.shape[2] == 21
    assert whole.frames.shape[0] == 41
    plain = made(engine, frames=41, settings={"temporal_upsampling": 1})
    assert (whole.frames[1:] != plain.frames[1:]).any()

    out = tmp_path / "x.mp4"
    with pytest.raises(Cancelled):
        made(engine, frames=41, journal=Journal(out), on_event=stop_at(7))  # of the second window
    again = made(engine, frames=41, journal=Journal(out, resume=True))
    assert torch.equal(again.latents, whole.latents)
    longer = made(engine, frames=57)
    assert longer.latents is not None
    assert torch.equal(longer.latents[:, :, :17], whole.latents[:, :, :17])


def test_windows_are_shown_what_was_made_at_both_rates(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[LatentState] = []
    sample = engine.sample
    monkeypatch.setattr(engine, "sample", lambda plan, state, *rest, **options: (
        states.append(state), sample(plan, state, *rest, **options))[1])
    clip = made(engine, frames=33)
    first, second = states[:2]
    assert first.known_upsampled is None
    assert second.known_upsampled is not None
    assert not second.known_upsampled.alone
    known = int((~second.denoise_mask[0, 0, :, 0, 0]).sum())
    assert torch.equal(second.known_upsampled.latents, clip.latents[:, :, 9 - 2 * known : 9])
    there = upsampled_state(second, torch.zeros_like(second.latents), 0.5, 2, STRIDES.t)
    assert there.times is not None
    assert there.times.tolist() == [n / 2 - 0.5 for n in range(2 * second.latents.shape[2])]
    assert int((~there.denoise_mask[0, 0, :, 0, 0]).sum()) == 2 * known


@pytest.mark.parametrize(("first", "then", "hand_over"), [
    (2, 2, "latents"), (2, 1, "latents"), (1, 2, "latents"), (None, 2, "pixels"),
])  # fmt: skip
def test_a_clip_continues_from_one_of_any_rate(
    engine: Engine, tmp_path: Path, first: int | None, then: int, hand_over: str
) -> None:
    begin = made(engine, frames=17, settings={"temporal_upsampling": first or 1}, audio="generate")
    if first is None:
        begin.info = replace(begin.info, recipe=None)
    begin.save(tmp_path / "a.mp4")
    clip = made(engine, prefix=tmp_path / "a.mp4", frames=33,
                settings={"temporal_upsampling": then}, audio="generate")
    assert clip.recipe["hand_over"] == hand_over
    assert clip.recipe["plan"]["temporal_upsampling"] == then
    clip.save(tmp_path / "b.mp4")
    frames = Clip.from_file(tmp_path / "b.mp4").frames
    assert len(frames) == 33
    assert (frames[:17] == Clip.from_file(tmp_path / "a.mp4").frames).all()
    assert clip.sound is not None
    assert len(clip.sound) == round(33 / 12 * clip.sound_rate)
    again = made(engine, prefix=tmp_path / "b.mp4", frames=41,
                 settings={"temporal_upsampling": then})
    again.save(tmp_path / "c.mp4")
    assert Clip.from_file(tmp_path / "c.mp4").num_frames == 41


def test_finer_frames_cost_time_and_memory(engine: Engine) -> None:
    setup, stages = Setup(torch.device("cpu"), "fp32"), []
    for temporal_upsampling in (1, 2):
        request = Request.of(PROMPT, {"seed": 1, "audio": "none", "last_image": GIVEN,
                                      "settings": {"temporal_upsampling": temporal_upsampling},
                                      "cache": "first-block"})
        plan = settle(engine.folder, request)
        made = estimate(engine.folder, plan, request, setup)
        stages.append({stage.name: stage for stage in made.stages})
        (window,) = count_passes(engine.folder, plan, request).windows
        assert window.frames == 4
        assert window.drawn == (6 if temporal_upsampling == 2 else 4)  # a still stays one
    plain, finer = stages
    assert plain["denoise"].seconds < finer["denoise"].seconds < 2 * plain["denoise"].seconds
    assert plain["decode"].seconds < finer["decode"].seconds <= 2 * plain["decode"].seconds
    assert plain["denoise"].bytes < finer["denoise"].bytes
    assert plain["prepare"] == finer["prepare"]


@pytest.mark.parametrize(("options", "why"), [
    ({"frames": 1}, "has a single frame"),
    ({"steps": 1}, "has no step on one side of the level 0.9"),
])  # fmt: skip
def test_what_cannot_be_drawn_finer_is_drawn_as_it_is(
    engine: Engine, options: dict[str, Any], why: str
) -> None:
    assert made(engine, **options).recipe["plan"]["temporal_upsampling"] == 1
    with pytest.raises(InputError, match=f"temporal_upsampling is 2, but this clip {why}"):
        made(engine, **options, settings={"temporal_upsampling": 2})


def test_a_rate_that_a_model_does_not_draw_at_is_refused(
    engine: Engine, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match="temporal_upsampling is 3, but finer has temporal "
                                         "upsampling by 2; give 1 or 2"):
        made(engine, settings={"temporal_upsampling": 3})
    plain = load(str(tiny_model), device="cpu", dtype="fp32")
    with pytest.raises(InputError, match="has no temporal upsampling; leave it out"):
        plain.generate(PROMPT, settings={"temporal_upsampling": 2})
    with pytest.raises(InputError, match="temporal_upsampling is 0; give a whole number "
                                         "from 1 to 16"):
        made(engine, settings={"temporal_upsampling": 0})
