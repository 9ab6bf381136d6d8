"""The world's sound: deterministic, in time to the sample, and different where it should be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from train.toybox.world.ambience import LAYERS, ambience_of, ambient_sound
from train.toybox.world.cast import SPRITES
from train.toybox.world.cues import SAMPLE_RATE, sound_cues
from train.toybox.world.scenes import PLACES, Actor, Scene, compose_scene, sample_scenes, times_in
from train.toybox.world.sound import impact_sound, synthesize
from train.toybox.world.truth import events, ground_truth
from train.toybox.world.voices import VOICES, Call, Drone
from vidgen.core.errors import InputError

CALLERS = [name for name, voice in VOICES.items() if isinstance(voice, Call)]


def in_room(sprite: str, motion: str = "stays", seed: int = 0, **settings: str) -> Scene:
    return Scene(seed, (Actor(sprite, motion, **settings),), "room")


def bands(sound: torch.Tensor) -> torch.Tensor:
    """Mean log energies [B, 48] of bands a sixth of an octave wide and more, [B, N] given."""
    power = torch.stft(
        sound, 1024, 512, window=torch.hann_window(1024), return_complex=True
    ).abs().square()
    edges = torch.logspace(np.log10(2), np.log10(512), 49).round().long()
    parts = [power[:, a : max(a + 1, b)].mean(1) for a, b in pairwise(edges)]
    loud = torch.stack(parts, 1)
    return (loud.mean(2) + 1e-7).log()


def test_every_sprite_has_a_voice_of_its_own() -> None:
    assert VOICES.keys() == SPRITES.keys()
    assert len(set(VOICES.values())) == len(VOICES)


def test_a_scene_sounds_the_same_alone_and_among_others() -> None:
    scenes = sample_scenes(3, 4)
    together = synthesize(scenes, 17)
    assert torch.equal(synthesize(scenes[2:3], 17)[0], together[2])
    assert together.dtype == torch.float32
    assert together.shape == (4, round(17 / 12 * SAMPLE_RATE))


@pytest.mark.long
def test_levels_are_sensible() -> None:
    sound = synthesize([*sample_scenes(0, 24), *(in_room(s, seed=9) for s in SPRITES)])
    peaks = sound.abs().amax(1)
    assert sound.isfinite().all()
    assert float(peaks.max()) < 1
    assert float(peaks.min()) > 0.05


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 12.0), (5, 12.0), (65, 24.0)])
def test_any_length_has_its_sound(num_frames: int, fps: float) -> None:
    sound = synthesize([in_room("dog")], num_frames, fps=fps)
    assert sound.shape[1] == round(num_frames / fps * SAMPLE_RATE)
    assert any(cue.kind == "call" for cue in sound_cues(in_room("dog"), num_frames, fps=fps))


@pytest.mark.long
def test_sounds_begin_at_their_cues_to_the_sample() -> None:
    scenes = [in_room(sprite, seed=4) for sprite in CALLERS]
    for scene, sound in zip(scenes, synthesize(scenes, 17).numpy(), strict=True):
        first = sound_cues(scene, 17)[0].sample
        tone = np.sqrt(np.mean(sound[first - 160 : first] ** 2))
        rise = np.abs(sound[first : first + 80]).max()
        assert rise > 4 * tone, scene.actors[0].sprite  # within 5 ms
        assert np.abs(sound[first - 160 : first]).max() < 6 * tone


def test_impacts_come_when_bounces_meet_the_floor() -> None:
    for seed in range(6):
        scene = compose_scene(seed, "soccer ball", "bounces", "room")
        met = [event.seconds for event in events(scene) if event.kind == "contact"]
        heard = [cue.seconds for cue in sound_cues(scene) if cue.kind == "impact"]
        assert met
        assert heard == pytest.approx(met, abs=1 / SAMPLE_RATE)
    assert ground_truth(scene, 9, 32, 32).cues == sound_cues(scene, 9, 32, 32)


@pytest.mark.parametrize("motion", ["spins", "swings", "circles"])
def test_marks_of_turning_motions_are_where_the_track_says(motion: str) -> None:
    from train.toybox.world.motion import Clock, actor_tracks, frame_sides

    scene, clock = compose_scene(2, "star", motion, "room"), Clock(33, 12.0)
    (track,) = actor_tracks(scene, frame_sides(128, 128), clock, np.linspace(0, 1, 20001))
    steps = np.linspace(0, 1, 20001)
    assert len(track.turns) >= 1
    for mark in track.turns:
        at = int(np.abs(steps - mark).argmin())
        if motion == "swings":
            assert abs(abs(track.angle[at]) - np.abs(track.angle).max()) < 1e-3
        elif motion == "spins":
            assert track.angle[at] / (2 * np.pi) == pytest.approx(
                round(track.angle[at] / (2 * np.pi)), abs=1e-3
            )
        else:
            assert track.x[at] == pytest.approx(track.x.max(), abs=1e-3)
    assert [cue.seconds for cue in sound_cues(scene)] == pytest.approx(
        [mark * clock.duration_s for mark in track.turns], abs=1 / SAMPLE_RATE
    )


@pytest.mark.long
def test_voices_can_be_distinguished_by_their_spectra() -> None:
    known = bands(synthesize([in_room(sprite, seed=1) for sprite in VOICES], 25))
    asked = bands(synthesize([in_room(sprite, seed=2) for sprite in VOICES], 25))
    nearest = torch.cdist(asked, known).argmin(1)
    assert (nearest == torch.arange(len(VOICES))).float().mean() > 0.95


def test_ambiences_can_be_distinguished_by_their_spectra() -> None:
    def heard(seed: int) -> torch.Tensor:
        scenes = [Scene(seed, (Actor("star"),), p, times_in(p)[0]) for p in PLACES]
        sounds = np.stack([ambient_sound(scene, 48_000, SAMPLE_RATE) for scene in scenes])
        return bands(torch.from_numpy(sounds).float())

    names = [ambience_of(place) for place in PLACES]
    assert set(names) == set(LAYERS)
    nearest = torch.cdist(heard(1), heard(2)).argmin(1)
    assert [names[i] for i in nearest] == names


def test_rain_is_heard_and_fog_muffles() -> None:
    def high(weather: str) -> float:
        scene = Scene(1, (Actor("star"),), "ocean", weather=weather)
        spectrum = np.abs(np.fft.rfft(ambient_sound(scene, 32_000, SAMPLE_RATE))) ** 2
        return float(spectrum[6000:].sum())  # above 3 kHz

    assert high("fog") < 0.5 * high("clear") < 0.25 * high("rain")


def test_an_engine_turns_faster_when_it_goes_faster() -> None:
    def pitch(motion: str, **settings: str) -> float:
        sound = synthesize([in_room("car", motion, seed=7, **settings)])[0, 8000:24000].numpy()
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(16000))) ** 2
        line = np.fft.irfft(spectrum)[: SAMPLE_RATE // 60]
        return SAMPLE_RATE / (SAMPLE_RATE // 200 + line[SAMPLE_RATE // 200 :].argmax())

    assert VOICES["car"].__class__ is Drone
    assert 1.05 < pitch("moves right", speed="fast") / pitch("stays") < 1.4


def test_larger_sprites_land_more_deeply() -> None:
    peaks = []
    for size in ("small", "medium", "large"):
        spectrum = np.abs(np.fft.rfft(impact_sound(size, "animal", 0), 16000))
        peaks.append(int(spectrum.argmax()))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 2 * peaks[2]


def test_what_drives_past_rushes_by_in_the_middle() -> None:
    scene = in_room("pizza", "drives past", seed=3, direction="left")
    (cross,) = [e.seconds for e in events(scene) if e.kind == "cross"]
    cues = {cue.sample for cue in sound_cues(scene)}
    sound = synthesize([scene])[0].numpy()
    quiet = np.ones(len(sound), bool)
    for start in cues:
        quiet[start : start + 8000] = False
    times = np.arange(len(sound)) / SAMPLE_RATE
    near = sound[quiet & (np.abs(times - cross) < 0.4)]
    far = sound[quiet & (np.abs(times - cross) > 1.1)]
    assert len(near) > 1000
    assert len(far) > 1000
    assert near.std() > 1.5 * far.std()


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="num_frames"):
        synthesize([in_room("cat")], 0)
    with pytest.raises(InputError, match="scene"):
        synthesize([])
