"""A model that makes sound for its pictures, from the request to the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models import add_onset_detector, build_tiny_model
from tests.stopping import stop_after
from vidgen.cli.main import main
from vidgen.core.errors import Cancelled, InputError
from vidgen.core.request import Request
from vidgen.media.clip import Clip
from vidgen.media.onsets import find_onsets
from vidgen.media.sound import read_sound
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.onset_detector import OnsetDetector
from vidgen.pipeline import denoise as networks
from vidgen.pipeline.engine import load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.journal import journal as journals
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.recorded import own_options
from vidgen.pipeline.replay import request_from_recipe
from vidgen.pipeline.sound import own_sound as own_sounds
from vidgen.pipeline.sound.own_sound import Impacts
from vidgen.pipeline.tail import no_beginning

WORDS = {"seed": 3, "frames": 9, "steps": 2}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "heard"
    return load(build_tiny_model(folder, sound=True), dtype="fp32")


def test_a_clip_comes_with_sound_as_long_as_its_picture(engine, tmp_path):
    clip = engine.generate("a red car bounces", **WORDS)
    assert clip.sound_rate == 16_000
    assert clip.sound.shape == (round(9 / 12 * 16_000), 1)
    assert clip.sound.dtype == np.float32
    assert np.abs(clip.sound).max() > 0
    clip.save(tmp_path / "a.mp4")
    samples, rate = read_sound(tmp_path / "a.mp4")
    assert len(samples) / rate == pytest.approx(9 / 12, abs=1024 / rate)


def test_the_same_seed_sounds_the_same_and_another_one_otherwise(engine):
    first, again = (engine.generate("a cat", **WORDS) for _ in range(2))
    assert np.array_equal(first.sound, again.sound)
    assert np.array_equal(first.frames, again.frames)
    other = engine.generate("a cat", **WORDS | {"seed": 4})
    assert not np.array_equal(first.sound, other.sound)


def test_the_picture_passes_once_and_its_sound_is_guided_towards_it(engine, monkeypatch):
    pictures, heard = [], []
    forward, listen = SpacetimeDiT.forward, SpacetimeDiT.listen

    def see(self, *args, cache=None, **options):
        pictures.append(cache is not None)
        return forward(self, *args, cache=cache, **options)

    def hear(self, *args, cache=None, **options):
        heard.append(cache is not None)
        return listen(self, *args, cache=cache, **options)

    monkeypatch.setattr(SpacetimeDiT, "forward", see)
    monkeypatch.setattr(SpacetimeDiT, "listen", hear)
    engine.generate("a cat", **WORDS, guidance=3.0)
    assert pictures == [False, False] * WORDS["steps"] + [True]
    assert heard == [True, False] * WORDS["steps"]
    pictures.clear(), heard.clear()
    engine.generate("a cat", **WORDS, guidance=1.0)
    assert pictures == [False] * WORDS["steps"] + [True]
    assert heard == [True] * WORDS["steps"]


def test_listening_to_a_picture_gives_what_passing_both_gives(engine, monkeypatch):
    listened = engine.generate("a cat", **WORDS, guidance=3.0).sound
    monkeypatch.setattr(
        networks, "_listener", lambda *given: networks._denoiser(*given, None, None)
    )
    both = engine.generate("a cat", **WORDS, guidance=3.0).sound
    assert np.abs(listened).max() > 0.01
    assert np.abs(listened - both).max() < 1e-4 * np.abs(both).max()


def sound_of(engine, plan, request):
    """The sound to make for a clip of one window."""
    windows = [(0, plan.latents.num_frames)]
    return own_sounds.own_sound(engine.loader, plan, request, windows, no_beginning(plan))


def test_a_longer_clip_begins_with_the_noise_of_the_shorter_one(engine):
    def state(frames):
        request = Request.of("a cat", WORDS | {"frames": frames})
        plan = engine.plan(request, Inputs())
        prepared = engine.prepare(plan, request, Inputs())
        own = sound_of(engine, plan, request)
        return own.add_to(prepared, 0, plan.latents.num_frames).sound

    short, long = state(9), state(17)
    count = short.latents.shape[2]
    assert torch.equal(short.latents, long.latents[:, :, :count])


def test_of_several_sounds_the_one_is_kept_that_the_others_bear_out(engine, monkeypatch):
    alone = engine.generate("a cat", **WORDS, guidance=3.0)
    for wanted in range(3):
        told, passes = [], []
        forward = SpacetimeDiT.forward

        def see(self, latents, *args, cache=None, forward=forward, passes=passes, **options):
            passes.append(0 if cache is None else len(latents))
            return forward(self, latents, *args, cache=cache, **options)

        def choose(sounds, rate, told=told, wanted=wanted):
            told.append((sounds, rate))
            return wanted

        with monkeypatch.context() as patched:
            patched.setattr(SpacetimeDiT, "forward", see)
            patched.setattr(own_sounds, "most_agreed", choose)
            clip = engine.generate("a cat", **WORDS, guidance=3.0, settings={"audio_candidates": 3})
        [(sounds, rate)] = told
        assert (len(sounds), rate) == (3, 16_000)
        assert sum(passes) == 1  # the picture's, for all of them
        count = len(clip.sound)
        heard = sounds[wanted, :count].clamp(-1, 1).numpy()
        assert np.abs(clip.sound[:, 0] - heard).max() < 1e-5
        assert np.array_equal(clip.frames, alone.frames)
        assert np.allclose(clip.sound, alone.sound, atol=1e-5) == (wanted == 0)
        assert all(not torch.equal(sounds[0], other) for other in sounds[1:])


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "looks", sound=True)
    return load(add_onset_detector(folder), dtype="fp32")


def test_sounds_are_drawn_until_one_goes_with_what_is_seen(looking, monkeypatch):
    rounds, progress, moved = [], [], []

    def see(sounds, rate):
        rounds.append(sounds)
        return find_onsets(sounds, rate)

    def generate(at, enough):
        """Something is seen at one of the picture's 24 moments."""
        rounds.clear()
        progress.clear()
        odds = torch.zeros(1, 3, 8)
        odds.view(-1)[at] = 1
        monkeypatch.setattr(OnsetDetector, "expected", lambda _detector, _latents: odds)
        config = looking.folder.components["onset_detector"].config
        monkeypatch.setitem(config.__dict__, "enough", enough)
        clip = looking.generate("a cat", **WORDS,
                                settings={"audio_candidates": 10, "audio_delay": 0.05},
                                on_event=lambda p: progress.append((p.done, p.total))
                                if p.stage == "sound" else None)
        return clip.sound[:, 0], torch.cat(rounds)

    monkeypatch.setattr(own_sounds, "find_onsets", see)
    for at in (9, 12, 17, 20):
        sound, sounds = generate(at, enough=2)
        assert [len(made) for made in rounds] == [4, 4, 2]
        assert progress == [(0, 2), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4), (4, 6), (5, 6), (6, 6)]
        moment = (1 + 4 * (at / 8 - 1) + 0.25) / 12 + 0.05
        impact = Impacts(np.array([moment]), np.ones(1))
        onsets = find_onsets(sounds, 16_000)
        best = int(np.argmax([impact.fit(each) for each in onsets]))
        heard = sounds[best, : len(sound)].clamp(-1, 1).numpy()
        late_s, met = impact.lateness(onsets[best])
        late = round(16_000 * float(np.clip(late_s / met if met else 0, -0.05, 0.05)))
        moved.append(late)
        there = slice(max(0, -late), len(sound) - max(0, late))
        assert np.abs(sound[there] - np.roll(heard, -late)[there]).max() < 1e-5
        generate(at, enough=0)
        assert [len(made) for made in rounds] == [4]
    assert any(moved)


def test_what_later_windows_show_is_heard_in_their_own_time(looking, monkeypatch):
    told = []

    def see(draw, hear, rate, _most, impacts):
        made = draw(range(1))
        told.append((impacts.times, hear(made).shape[1] / rate))
        return own_sounds.Kept(made[0])

    monkeypatch.setattr(own_sounds, "best_sound", see)
    settings = {"audio_candidates": 2, "audio_delay": 0}
    looking.generate("a cat", **WORDS | {"frames": 33, "settings": settings})
    assert len(told) > 1
    for times, seconds in told:
        assert -4 / 12 <= times[0] < 1 / 12
        assert seconds - 2 / 12 < times[-1] < seconds + 1 / 12


def test_sound_follows_its_picture_by_a_delay_and_takes_steps_of_its_own(engine):
    steps, states = [], []
    plan = engine.plan(Request.of("a cat", WORDS | {"settings": {"audio_delay": 0.02}}), Inputs())
    at_once = engine.plan(Request.of("a cat", WORDS), Inputs())
    for each in (plan, at_once):
        prepared = engine.prepare(each, Request.of("a cat", WORDS), Inputs())
        own = sound_of(engine, each, Request.of("a cat", WORDS))
        states.append(own.add_to(prepared, 0, each.latents.num_frames).sound)
    late, sharp = states
    assert sharp.start_s - late.start_s == pytest.approx(0.02)
    assert torch.equal(late.latents, sharp.latents)
    engine.generate("a cat", **WORDS,
                    settings={"audio_steps": 5, "audio_candidates": 2}, on_event=lambda p:
                    steps.append((p.done, p.total)) if p.stage == "sound" else None)
    assert steps == [(i, 5) for i in range(6)]


@pytest.mark.parametrize(("name", "value"), [
    ("audio_candidates", 3), ("audio_delay", 0.02), ("audio_steps", 5),
])
def test_what_is_of_a_sound_that_is_not_made_is_refused(engine, tiny_model, name, value):
    message = f"{name} is {value}, but it applies only to sound by the model"
    with pytest.raises(InputError, match=message):
        engine.generate("a cat", **WORDS, audio="none", settings={name: value})
    with pytest.raises(InputError, match=message):
        load(tiny_model, dtype="fp32").generate("a cat", **WORDS, settings={name: value})


def test_a_recipe_tells_how_its_sound_was_made(engine, tmp_path):
    clip = engine.generate("a cat", **WORDS,
                           settings={"audio_steps": 3, "audio_candidates": 2, "audio_delay": 0.02})
    recipe = clip.recipe
    again = request_from_recipe(recipe, tmp_path)
    assert np.array_equal(engine.generate(again).sound, clip.sound)
    for name in ("sound_steps", "sound_candidates", "sound_delay_s"):
        del recipe["plan"][name]  # as recipes were before there was a choice
    early = request_from_recipe(recipe, tmp_path)
    assert early.settings.items() >= {"audio_candidates": 1, "audio_delay": 0}.items()
    assert np.array_equal(engine.generate(early).sound, engine.generate("a cat", **WORDS).sound)
    silent = engine.generate("a cat", **WORDS, audio="none")
    assert engine.generate(request_from_recipe(silent.recipe, tmp_path)).sound is None
    assert own_options(clip.recipe)["settings"]["audio_delay"] == 0.02
    assert "audio_delay" not in own_options(clip.recipe, audio="none").get("settings", {})


def test_the_picture_is_the_same_without_sound_and_no_track_is_written(engine, tmp_path):
    clip = engine.generate("a cat", **WORDS, audio="none")
    assert np.array_equal(clip.frames, engine.generate("a cat", **WORDS).frames)
    assert clip.sound is None
    clip.save(tmp_path / "a.mp4")
    assert read_sound(tmp_path / "a.mp4") is None


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_no_sound_is_made_that_a_file_cant_hold(engine, tmp_path, monkeypatch, name):
    made, own, silence = [], own_sounds.OwnSound, np.zeros((12_000, 1), np.float32)
    monkeypatch.setattr(own, "follow", lambda *_: made.append(1))
    monkeypatch.setattr(own, "decode", lambda _: (silence, 16_000))
    words = ["generate", "a cat", "--model", str(engine.folder.path), "--frames", "9"]
    assert main([*words, "--steps", "1", "-o", str(tmp_path / name)]) == 0
    assert bool(made) == name.endswith(".mp4")
    engine.generate("a cat", **WORDS, audio="none").save(tmp_path / "short.mp4")
    made.clear()
    words = ["extend", str(tmp_path / "short.mp4"), "--seconds", "0.5"]
    assert main([*words, "-o", str(tmp_path / f"longer-{name}")]) == 0
    assert bool(made) == name.endswith(".mp4")


def test_a_clip_that_is_kept_or_re_imagined_is_heard_again(engine, tmp_path):
    engine.generate("a cat", **WORDS, audio="none").save(tmp_path / "seen.mp4")
    sounds = []
    for strength in (0, 0.5):
        given = {**WORDS, "video": tmp_path / "seen.mp4", "strength": strength}
        heard = engine.generate("a cat", **given)
        assert np.array_equal(
            heard.frames, engine.generate("a cat", **given, audio="none").frames
        )
        sounds.append(heard.sound)
    assert not np.array_equal(*sounds)
    assert all(np.abs(sound).max() > 0 for sound in sounds)


def moved_by(monkeypatch):
    """By how many samples each clip's sound is moved."""
    moved, move = [], own_sounds.bring_forward

    def note(samples, count):
        moved.append(count)
        move(samples, count)

    monkeypatch.setattr(own_sounds, "bring_forward", note)
    return moved


@pytest.mark.parametrize("model", ["engine", "looking"])
def test_sound_continues_through_windows_and_through_kills(model, request, tmp_path, monkeypatch):
    engine, moved = request.getfixturevalue(model), moved_by(monkeypatch)
    words = WORDS | {"frames": 33, "settings": {"audio_candidates": 2}}
    if model == "looking":  # in every window something else is seen
        monkeypatch.setattr(OnsetDetector, "expected", lambda _, latents: (
            torch.zeros(1, latents.shape[2], 8).index_fill_(2, torch.tensor([3]), 1)
        ))
    straight = engine.generate("a cat", **words)
    assert straight.sound.shape == (round(33 / 12 * 16_000), 1)
    assert (moved == [0]) == (model == "engine")
    monkeypatch.setattr(journals, "PATIENCE", 0)
    output = tmp_path / "a.mp4"
    for count in range(1, 11):
        try:
            clip = engine.generate("a cat", **words, journal=Journal(output, resume=True),
                                   on_event=stop_after(count, ("sample", "sound")))
        except Cancelled:
            continue
        break
    assert np.array_equal(clip.sound, straight.sound)
    assert np.array_equal(clip.frames, straight.frames)


def test_an_extension_continues_from_what_was_heard(engine, tmp_path):
    engine.generate("a cat", **WORDS).save(tmp_path / "a.mp4")
    longer = engine.generate("a cat", seed=3, steps=2, prefix=tmp_path / "a.mp4", seconds=2)
    assert longer.sound_rate == 16_000
    assert len(longer.sound) == 2 * 16_000
    before, _ = read_sound(tmp_path / "a.mp4")
    count = round(9 / 12 * 16_000)
    assert np.array_equal(longer.sound[:count], before[:count])
    assert np.abs(longer.sound[count:]).max() > 0
    longer.save(tmp_path / "b.mp4")
    assert len(Clip.from_file(tmp_path / "b.mp4").sound) == pytest.approx(2 * 16_000, abs=1024)
    silent = engine.generate("a cat", **WORDS, audio="none")
    silent.save(tmp_path / "c.mp4")
    heard = engine.generate("a cat", seed=3, steps=2, prefix=tmp_path / "c.mp4", seconds=2)
    assert not heard.sound[:count].any()
    assert np.abs(heard.sound[count:]).max() > 0


def test_a_picture_that_follows_a_sound(engine, tmp_path):
    engine.generate("a cat", **WORDS).save(tmp_path / "a.mp4")
    given = {**WORDS, "audio": tmp_path / "a.mp4", "follow_audio": True}
    for sampler in ("ancestral", "unipc"):
        given["sampler"] = sampler
        clip = engine.generate("a cat", **given)
        assert np.array_equal(clip.frames, engine.generate("a cat", **given).frames)
    unheard = engine.generate("a cat", **WORDS, audio=tmp_path / "a.mp4")
    assert not np.array_equal(clip.frames, unheard.frames)
    assert np.array_equal(clip.sound, unheard.sound)
    long = engine.generate("a cat", **given | {"frames": 33, "audio_loop": True})
    assert len(long.frames) == 33
    with pytest.raises(InputError, match="follow_audio needs --audio FILE"):
        engine.generate("a cat", **WORDS, audio="none", follow_audio=True)


def test_a_model_without_sound_follows_none(tiny_model, tmp_path):
    with pytest.raises(InputError, match="doesn't support follow_audio"):
        load(tiny_model).generate("a cat", **WORDS, audio=tmp_path / "a.wav", follow_audio=True)
