"""The transformer learns sound beside clips: what is heard when, what is known, and the program."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.faults import ForkServer
from tests.programs import run_program
from train.toybox.initial import init_dit
from train.toybox.model_files import save_module
from train.toybox.phases import Phase, PhasedRun
from train.toybox.sound_vae import load_sound_vae
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.dit_data import ClipDraws
from train.toybox.tasks.sound_cache import SoundCache, SoundMix, draw_sound, with_sound
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache, load_vae
from train.toybox.world.scenes import SceneMix
from vidgen.core.errors import InputError
from vidgen.diffusion import condition
from vidgen.diffusion.state import new_state, sound_span
from vidgen.models.audio import AudioVAE
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS, TEXT_PRESETS
from vidgen.models.text import UMT5Encoder


def test_the_sound_of_a_stretch_is_all_that_is_heard_while_it_is_shown():
    assert sound_span(0, 9, 4, 12, 31.25) == (0, 86, 0.0)
    assert sound_span(0, 1, 4, 12, 31.25) == (0, 3, 0.0)
    begin, end, start_s = sound_span(3, 6, 4, 12, 31.25)
    assert begin == int(9 / 12 * 31.25)
    assert end == 86
    assert start_s == pytest.approx(begin / 31.25 - 1.0)


def test_stretches_that_follow_each_other_leave_no_sound_out():
    for first in range(1, 8):
        before, after = sound_span(0, first, 4, 12, 31.25), sound_span(first, 2, 4, 12, 31.25)
        assert before[1] - 1 <= after[0] <= before[1]


@pytest.fixture(scope="module")
def sound_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = AUDIO_VAE_PRESETS["tiny"]
    folder = tmp_path_factory.mktemp("sound_vae")
    save_module(AudioVAE(config).state_dict(), config, folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def cache(tiny_model: Path, sound_vae: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("latents")
    clips = ToyboxCache(CacheConfig(str(folder), str(tiny_model / "vae"), 1, shard_size=4,
                                    height=32, width=32))  # fmt: skip
    return SoundCache(SoundMix(str(sound_vae)), clips)


def heard(cache: SoundCache, state, first: int = 0, picture_known: float = 1.0):
    sound = torch.arange(86.0).expand(len(state.latents), 4, 86)
    mix = replace(cache.mix, picture_known=picture_known)
    given = draw_sound(~state.denoise_mask, first, mix, cache, torch.Generator().manual_seed(0))
    return with_sound(state, sound, first, given, cache)


def test_sound_is_made_for_a_given_picture_or_a_picture_for_given_sound(cache):
    first = condition.prefix(new_state(torch.randn(2, 4, 9, 4, 4)),
                                  torch.randn(2, 4, 1, 4, 4))  # fmt: skip
    for state in (new_state(torch.randn(2, 4, 9, 4, 4)), first):
        given = heard(cache, state)
        assert given.is_known
        assert given.sound.clean.shape == (2, 4, 86)
        assert given.sound.denoise_mask.all()
        given = heard(cache, state, picture_known=0.0)
        assert torch.equal(given.denoise_mask, state.denoise_mask)
        assert not given.sound.denoise_mask.any()
    with pytest.raises(InputError, match=r"picture_known is 1\.2"):
        SoundMix("", picture_known=1.2)


def test_a_beginning_is_known_with_its_sound(cache):
    state = condition.prefix(new_state(torch.randn(2, 4, 9, 4, 4)),
                             torch.randn(2, 4, 3, 4, 4))  # fmt: skip
    sound = heard(cache, state).sound
    known = int((~sound.denoise_mask[0, 0]).sum())
    assert known == int(9 / 12 * 31.25)
    assert not sound.denoise_mask[:, :, :known].any()
    inside = condition.prefix(new_state(torch.randn(2, 4, 5, 4, 4)),
                              torch.randn(2, 4, 1, 4, 4))  # fmt: skip
    sound = heard(cache, inside, first=4).sound
    assert sound.clean[0, 0, 0] == int(13 / 12 * 31.25)
    assert 0 < int((~sound.denoise_mask[0, 0]).sum()) < 12


@pytest.mark.parametrize("wanted", [{"motion": "bounces"}, {"sprites": ("cow", "frog", "owl")}])
def test_clips_of_one_motion_or_some_sprites_follow_each_other_in_the_world(
    cache, tmp_path, wanted
):
    def shows(scene):
        (name, values), = wanted.items()
        return any(getattr(each, name.removesuffix("s")) in values for each in scene.actors)

    config = replace(cache.clips.config, folder=str(tmp_path), shard_size=6, **wanted)
    some = ToyboxCache(config)
    scenes = [some.scene(index) for index in (5, 0, 1, 2, 3, 4)]
    assert all(map(shows, scenes))
    plain = replace(config, motion=None, sprites=(), folder=str(tmp_path / "all"))
    first = ToyboxCache(plain)
    world = [first.scene(index) for index in range(scenes[0].seed - first.scene(0).seed + 1)]
    assert [*scenes[1:], scenes[0]] == [*filter(shows, world)], "none left out, in order"
    assert json.dumps(some.manifest) == json.dumps(first.manifest | wanted)
    with pytest.raises(InputError, match="motion is 'hops'; give one of"):
        replace(config, motion="hops")
    with pytest.raises(InputError, match="sprites has 'gnu'; give some of"):
        replace(config, sprites=("cow", "gnu"))


def test_clips_of_another_mix_of_scenes_lie_in_a_cache_of_their_own(cache, tmp_path):
    usual = replace(cache.clips.config, folder=str(tmp_path))
    tinted = ToyboxCache(replace(usual, mix=SceneMix(tint=1.0, two_actors=0.0)))
    scenes = [tinted.scene(index) for index in range(20)]
    assert all(actor.tint for scene in scenes for actor in scene.actors)
    with pytest.raises(InputError, match=r"mix is .*'tint': 1\.0.* there, None here"):
        ToyboxCache(usual)


@pytest.mark.long
def test_clips_in_which_something_is_hit_are_drawn_more_often(
    tiny_model: Path, sound_vae: Path, tmp_path: Path
) -> None:
    config = CacheConfig(str(tmp_path / "latents"), str(tiny_model / "vae"), 1, shard_size=24,
                         height=32, width=32)  # fmt: skip
    clips = ToyboxCache(config)
    clips.make(0, load_vae(config.vae, torch.device("cpu")), torch.device("cpu"))
    mix = SoundMix(str(sound_vae), share=1.0)
    sound = SoundCache(mix, clips)
    sound.make(0, load_sound_vae(sound_vae), torch.device("cpu"))
    struck = sound.struck.tolist()
    motions = [{actor.motion for actor in clips.scene(index).actors} for index in range(24)]
    assert 0 < len(struck) < 12
    assert all("bounces" in motions[index] for index in struck)
    phase = Phase(steps=4, num_frames=33, batch_size=16)

    def shown(share: float) -> list[torch.Tensor]:
        data = DiTData(
            run=PhasedRun(str(tmp_path / "run"), phases=(phase,)), caches=(config,), shifts=(1.0,),
            tokenizer=str(tiny_model / "tokenizer"), validation_clips=2,
            sound=replace(mix, struck=share),
        )  # fmt: skip
        source = ClipDraws(data, torch.device("cpu"), patch=2)
        return [source.batch(phase, step, 0).state.sound.clean for step in range(4)]

    hit = sound.load()[[index for index in struck if index < 22]].float()

    def count(batches: list[torch.Tensor]) -> int:
        return sum(any(torch.equal(row, one) for one in hit) for part in batches for row in part)

    assert count(shown(1.0)) == 4 * 16
    assert count(shown(0.0)) < 4 * 8


@pytest.mark.long
def test_the_program_learns_both_or_sound_alone(
    tiny_model: Path, sound_vae: Path, tmp_path: Path, server: ForkServer
) -> None:
    run = tmp_path / "run"
    config = {
        "preset": "tiny-sound", "text_preset": "tiny", "tokenizer": str(tiny_model / "tokenizer"),
        "shifts": [2.0], "validation_clips": 2, "pixel_weights": True,
        "sound": {"vae": str(sound_vae), "share": 1.0, "picture_known": 0.5},
        "caches": [{
            "folder": str(tmp_path / "latents"), "vae": str(tiny_model / "vae"), "shards": 2,
            "shard_size": 4, "height": 32, "width": 32,
        }],
        "run": {
            "folder": str(run), "device": "cpu", "validate_every": 100, "log_every": 1,
            "phases": [{"steps": 3, "num_frames": 17, "batch_size": 4}],
            "optim": {"lr": 1e-3, "muon_lr": 1e-3},
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    made = run_program(server, "train/toybox/cache.py", "-c", str(file))
    assert made.returncode == 0, made.stderr
    learned = run_program(server, "train/toybox/dit.py", "-c", str(file))
    assert learned.returncode == 0, learned.stderr
    scores = json.loads(learned.stdout)
    assert scores["sound_mean"] > 0
    lines = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    assert lines[0]["sound"] > 0
    learns_sound_alone(server, file, tiny_model, tmp_path)
    keeps_all_that_it_was_taught(server, file, tmp_path)
    silent = run_program(server,
        "train/toybox/dit.py", "-c", str(file), "--set", "preset=tiny", "--set",
                         f"run.folder={tmp_path / 'silent'}")  # fmt: skip
    assert silent.returncode == 2
    assert "no parts for sound" in silent.stderr


def learns_sound_alone(server: ForkServer, file: Path, model: Path, folder: Path) -> None:
    """Parts for sound change, pictures and whoever else draws them stay through the release."""
    out, run, dit = folder / "model", folder / "alone", SpacetimeDiT(DIT_PRESETS["tiny-sound"])
    shutil.copytree(model, out)
    init_dit(dit)
    save_module(dit.state_dict(), dit.config, out / "transformer", torch.bfloat16)
    save_module(dit.state_dict(), dit.config, out / "transformer_2", torch.bfloat16)
    (out / "few_step").mkdir()
    before = load_file(out / "transformer" / "model.safetensors")
    learned = run_program(server,
        "train/toybox/dit.py", "-c", str(file), "--set", "part=sound", "--set",
                          f"init={out}", "--set", f"run.folder={run}")
    assert learned.returncode == 0, learned.stderr
    released = run_program(server,
        "train/toybox/release.py", "dit", "--run", str(run), "--out", str(out))
    assert released.returncode == 0, released.stderr
    after = load_file(out / "transformer" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("audio" in name for name in changed)
    assert (out / "transformer_2").is_dir()
    assert (out / "few_step").is_dir()


def keeps_all_that_it_was_taught(server: ForkServer, file: Path, folder: Path) -> None:
    """A run that is to forget nothing at any level has nothing to learn from any clip."""
    taught = folder / "taught"
    dit, text = SpacetimeDiT(DIT_PRESETS["tiny-sound"]), UMT5Encoder(TEXT_PRESETS["tiny"])
    init_dit(dit)
    torch.nn.init.normal_(dit.head.proj.weight, std=0.1)
    for name, part in (("transformer", dit), ("text_encoder", text)):
        save_module(part.state_dict(), part.config, taught / name, torch.float32)

    def errors(*settings: str) -> dict[str, float]:
        options = [f"init={taught}", "part=transformer", f"keep={taught}", "run.dtype=fp32",
                   f"run.folder={folder / '-'.join(settings)}", *settings]
        made = run_program(server, "train/toybox/dit.py", "-c", str(file),
                           *(word for option in options for word in ("--set", option)))
        assert made.returncode == 0, made.stderr
        curve = folder / "-".join(settings) / "curve.jsonl"
        return json.loads(curve.read_text().splitlines()[0])

    for known, of in ((0, "velocity"), (1, "sound")):
        told = f"sound.picture_known={known}"
        assert errors("keep_above=0", told)[of] < 1e-8
        learned = errors("keep_above=1", told)[of]
        assert learned > 0.1 if of == "velocity" else learned < 1e-8
    words = run_program(server, "train/toybox/dit.py", "-c", str(file), "--set", f"keep={taught}")
    assert words.returncode == 2
    assert "keep needs part: transformer" in words.stderr
    unseen = run_program(server,
        "train/toybox/dit.py", "-c", str(file), "--set", "levels=[0.96, 1.0]")
    assert unseen.returncode == 2
    assert "between which no clip is validated; take in one of 0.2" in unseen.stderr
