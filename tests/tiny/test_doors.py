"""The command line asks for what Python asks for: one clip by either door."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import clips
from tests.commands import vidgen
from tests.lora_models import make_adapter, make_dit
from tests.models import add_verifier, build_tiny_model
from tests.sounds import save, tone
from tests.textures import texture
from tests.tiny.diffusers_models import build_diffusers_model
from tests.wan_models import build_diffusers
from vidgen.cli.main import verb_parser
from vidgen.cli.options import given_options
from vidgen.core.request import Request
from vidgen.media.clip import Clip
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.engine import load
from vidgen.weights.lora import write_lora

PROMPT = "a red car bounces"
LOADING, SAVING = ("offload", "quantize", "tiles", "attention"), ("label", "aigc")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "length": ("--seconds 0.5 --fps 10", {"seconds": 0.5, "fps": 10}),
    "size": ("--size 48x32 --frames 5 --image a.png --fit pad",
             {"size": (48, 32), "frames": 5, "image": "a.png", "fit": "pad"}),
    "sampler": ("--steps 3 --sampler euler --shift 2",
                {"steps": 3, "sampler": "euler", "shift": 2}),
    "guidance": ("--guidance 2 --negative 'a cat' --guidance-interval 0.1 0.8 "
                 "--guidance-rescale 0.5",
                 {"guidance": 2, "negative": "a cat", "guidance_interval": (0.1, 0.8),
                  "guidance_rescale": 0.5}),
    "first and last frame": ("--image a.png --last-image b.png",
                             {"image": "a.png", "last_image": "b.png"}),
    "frame": ("--frame 0.25=a.png", {"frame": [(0.25, "a.png")]}),
    "encode passes": ("--image a.png --set encode_passes=2",
                      {"image": "a.png", "settings": {"encode_passes": 2}}),
    "references": ("--reference a.png --reference b.png", {"reference": ["a.png", "b.png"]}),
    "mask": ("--video clip.mkv --mask mask.png", {"video": "clip.mkv", "mask": "mask.png"}),
    "strength": ("--video clip.mkv --strength 0.6", {"video": "clip.mkv", "strength": 0.6}),
    "cache": ("--steps 8 --cache first-block:0.5", {"steps": 8, "cache": "first-block:0.5"}),
    "adapter": ("--lora style.safetensors:0.5", {"lora": ["style.safetensors:0.5"]}),
    "marks": ("--label visible --aigc ACME", {"label": "visible", "aigc": "ACME"}),
    "attention": ("--attention sdpa", {"attention": "sdpa"}),
    "offload": ("--offload block", {"offload": "block"}),
    "int8": ("--quantize int8", {"quantize": "int8"}),
    "tiles": ("--size 96x64 --tiles 2x2", {"size": (96, 64), "tiles": "2x2"}),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "control": ("vace", "--size 32x32 --frames 5 --control clip.mkv --control-scale 0.5",
                {"size": (32, 32), "frames": 5, "control": "clip.mkv", "control_scale": 0.5}),
    "guidance of two experts": ("t2v-a14b", "--size 32x32 --frames 5 --guidance 3 --guidance-low 1",
                                {"size": (32, 32), "frames": 5, "guidance": 3, "guidance_low": 1}),
    "candidates": ("sure", "--set candidates=2", {"settings": {"candidates": 2}}),
    "own sound": ("sound", "--audio generate --set audio_steps=1 --set audio_candidates=2 "
                  "--set audio-delay=0.1",
                  {"audio": "generate",
                   "settings": {"audio_steps": 1, "audio_candidates": 2, "audio_delay": 0.1}}),
    "sound followed": ("sound", "--audio bed.wav --follow-audio",
                       {"audio": "bed.wav", "follow_audio": True}),
    "first frame drawn": ("tiny", "--first-frame-model sdxl", {"first_frame_model": "sdxl"}),
}

WORDS = {
    "--set image_guidance=2 --set image_guidance_reach=3 --set reference_guidance=1.5":
        {"settings": {"image_guidance": 2, "image_guidance_reach": 3, "reference_guidance": 1.5}},
    "--image a.png --set refine=4 --set encode_passes=2":
        {"image": "a.png", "settings": {"refine": 4, "encode_passes": 2}},
    "--set overlap=2 --set colour_hold=0.25": {"settings": {"overlap": 2, "colour_hold": 0.25}},
    "--set temporal_upsampling=2 --set candidates=3 --set regional_prompts=0.5 --set anchor=false":
        {"settings": {"temporal_upsampling": 2, "candidates": 3, "regional_prompts": 0.5,
                      "anchor": False}},
    "--word-normalisation crimson=red": {"word_normalisation": "crimson=red"},
    "--count 3 --strict --retry 2 --aigc ACME":
        {"count": 3, "strict": True, "retry": 2, "aigc": "ACME"},
    "--audio a.wav --audio-loop": {"audio": "a.wav", "audio_loop": True},
    "--audio-model heard --audio-prompt 'a hum'":
        {"audio_model": "heard", "audio_prompt": "a hum"},
    "--say 0.5=Hi --say @b.wav --voice en-gb": {"say": [(0.5, "Hi"), "@b.wav"], "voice": "en-gb"},
    "--dtype bf16 --offload stage --quantize int8 --devices 2 --shard --tiles 2x2 "
    "--attention sdpa":
        {"dtype": "bf16", "offload": "stage", "quantize": "int8", "devices": 2, "shard": True,
         "tiles": "2x2", "attention": "sdpa"},
}
"""What is handed on as it is, whatever model it is for."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder of what is given, and of models by their names."""
    folder = tmp_path_factory.mktemp("doors")
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(texture(40, 48, seed)).save(folder / name)
    halves = np.zeros((32, 32), np.uint8)
    halves[:, 16:] = 255
    Image.fromarray(halves).save(folder / "mask.png")
    clips.film(folder / "clip.mkv", clips.moving(9, size=(32, 32)), codec="ffv1")
    save(folder / "bed.wav", tone(1.0, channels=2))
    write_lora(make_adapter(make_dit(DIT_PRESETS["tiny"])), folder / "style.safetensors", "wan")
    (folder / "tiny").symlink_to(tiny_model)
    return folder


def build(folder: Path, name: str) -> None:
    """Build a model where it isn't yet."""
    if (folder / name).exists():
        return
    if name == "sdxl":
        build_diffusers_model(name, folder / name)
    elif name in ("sound", "sure"):
        build_tiny_model(folder / name, sound=name == "sound")
        if name == "sure":
            add_verifier(folder / name)
    elif name != "tiny":
        build_diffusers(folder / name, name)


def assert_same(model: str, words: str, options: Mapping[str, Any]) -> None:
    """Make the clip by the command line and in Python; frames and sound are equal."""
    pins = ("--dtype", "fp32", *(() if "offload" in options else ("--offload", "none")))
    vidgen("generate", PROMPT, "--model", model, "--seed", 5, "-o", "made.mkv", "--overwrite",
           *pins, *shlex.split(words))
    loading = {"offload": "none"} | {key: options[key] for key in LOADING if key in options}
    engine = load(model, device="cpu", dtype="fp32", **loading)
    asked = {key: value for key, value in options.items() if key not in (*LOADING, *SAVING)}
    clip, made = engine.generate(PROMPT, seed=5, **asked), Clip.from_file("made.mkv")
    clip.save("own.mkv", overwrite=True,
              **{key: value for key, value in options.items() if key in SAVING})
    own = Clip.from_file("own.mkv")
    kept = ("label", "aigc", "attention")
    assert {name: made.recipe.get(name) for name in kept} == {
        name: own.recipe.get(name) for name in kept}
    assert np.array_equal(made.frames, own.frames)
    assert (made.sound is None) == (own.sound is None)
    assert made.sound is None or np.array_equal(made.sound, own.sound)


@pytest.mark.parametrize("words", WORDS)
def test_words_of_a_command_are_options_of_a_request(words: str) -> None:
    args = verb_parser("generate")[1].parse([PROMPT, *shlex.split(words)])
    assert Request(**given_options(args)) == Request(
        prompt=PROMPT, **{key: value for key, value in WORDS[words].items()
                                          if key in Request.model_fields})
    others = WORDS[words].keys() - Request.model_fields
    assert {key: getattr(args, key) for key in others} == {
        key: WORDS[words][key] for key in others}


@pytest.mark.parametrize("case", CASES)
def test_a_command_makes_what_python_makes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(folder)
    assert_same("tiny", *CASES[case])


@pytest.mark.parametrize("case", OTHERS)
def test_a_command_makes_what_python_makes_with_other_models(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(folder)
    model, words, options = OTHERS[case]
    build(folder, model)
    if "first_frame_model" in options:
        build(folder, "sdxl")
    assert_same(model, words, options)
