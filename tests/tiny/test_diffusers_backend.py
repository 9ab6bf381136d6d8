"""Other families, tiny and of the real classes: seeds, progress, decoding, refusals, recipes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.sounds import save, tone
from tests.tiny.diffusers_models import FAMILIES, build_diffusers_model, open_diffusers_model
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.core.request import Request
from vidgen.media.clip import Clip
from vidgen.pipeline.diffusers_backend.engine import DiffusersEngine
from vidgen.pipeline.diffusers_backend.plan import Abilities
from vidgen.pipeline.inputs import Inputs
from vidgen.weights.folder import DiffusersFolder

PROMPT = "a red car bounces across the desert"
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
CASES: dict[str, dict[str, Any]] = {
    "ltx": {"size": "64x32", "frames": 9},
    "ltx2": {"size": "64x64", "frames": 9},
    "hunyuan": {"size": "32x32", "frames": 9},
    "hunyuan_i2v": {"size": "32x32", "frames": 9, "image": PICTURE},
    "hunyuan15": {"size": "32x32", "frames": 9},
    "cogvideox": {"size": "32x32", "frames": 9},
    "cogvideox_i2v": {"size": "32x32", "frames": 9, "image": PICTURE},
    "mochi": {"size": "32x32", "frames": 7},
    "skyreels": {"size": "32x32", "frames": 9},
    "skyreels_df": {"size": "32x32", "frames": 9},
    "animatediff": {"size": "32x32", "frames": 3},
    "sdxl": {"size": "32x32", "frames": 1},
    "sd3": {"size": "32x32", "frames": 1},
    "flux": {"size": "32x32", "frames": 1},
}
Open = Callable[[str], DiffusersEngine]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("foreign")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else build_diffusers_model(family, path)

    return folder


@pytest.fixture(scope="session")
def engine(models: Callable[[str], Path]) -> Open:
    opened: dict[str, DiffusersEngine] = {}

    def get(family: str) -> DiffusersEngine:
        if family not in opened:
            opened[family] = open_diffusers_model(models(family))
        return opened[family]

    return get


def generate(engine: DiffusersEngine, family: str, **options: Any) -> Any:
    return engine.generate(PROMPT, **{"seed": 3, "steps": 2, **CASES[family], **options})


def frames_of(output: Any) -> np.ndarray:
    frames = np.asarray(output[0])
    frames = frames[0] if frames.ndim == 5 else frames
    return (frames * 255).round().astype(np.uint8)


def test_every_family_has_a_case() -> None:
    assert CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", CASES)
def test_frames_are_those_of_the_pipeline_itself(engine: Open, family: str) -> None:
    ours, events = engine(family), []
    clip = generate(ours, family, on_event=events.append)
    request = Request.of(PROMPT, CASES[family])
    height, width = request.size[::-1]
    assert clip.frames.shape == (request.frames, height, width, 3)
    assert clip.frames.std() > 1
    pipe = ours.pipe.own
    arguments = {
        "prompt": PROMPT, "width": width, "height": height, "num_inference_steps": 2,
        "num_frames": request.frames, "generator": torch.Generator().manual_seed(3),
    }
    if "image" in CASES[family]:
        from PIL import Image, ImageOps

        arguments["image"] = ImageOps.fit(
            Image.fromarray(PICTURE), request.size, Image.Resampling.LANCZOS
        )
        arguments["num_frames"] += Abilities(pipe).cut_frames
    known = Abilities(pipe).defaults
    given = {name: value for name, value in arguments.items() if name in known}
    if hasattr(pipe.vae, "drop_last_temporal_frames"):  # Mochi slices for us, whole by default
        pipe.vae.use_framewise_decoding = False
    output = pipe(**given, output_type="np")
    reference = frames_of(output)
    assert np.abs(clip.frames.astype(int) - reference).max() <= 1
    if clip.sound is not None:
        assert np.allclose(clip.sound, output.audio[0].T[: len(clip.sound)], atol=1e-6)
    told = [(e.done, e.total) for e in events if e.stage == "sample"]
    assert told == [(1, 2), (2, 2)]
    plan = json.loads(json.dumps(clip.recipe))["plan"]
    assert (plan["seed"], plan["num_steps"], plan["prompt"]) == (3, 2, PROMPT)
    assert [plan["width"], plan["height"]] == [width, height]


@pytest.mark.parametrize("family", ["ltx", "ltx2", "cogvideox", "hunyuan15", "sdxl"])
def test_a_clip_of_a_batch_equals_it_alone(engine: Open, family: str) -> None:
    clips = generate(engine(family), family, seed=5, count=2)
    alone = generate(engine(family), family, seed=6)
    assert np.array_equal(clips[1].frames, alone.frames)
    assert not np.array_equal(clips[0].frames, alone.frames)


@pytest.mark.parametrize("family", ["ltx", "hunyuan15", "skyreels", "flux"])
def test_a_run_stops_between_two_steps_and_the_next_is_unharmed(
    engine: Open, family: str
) -> None:
    steps = []

    def stop(progress: Any) -> None:
        if progress.stage == "sample":
            steps.append(progress.done)
            raise Cancelled("stopped")

    before = generate(engine(family), family)
    with pytest.raises(Cancelled):
        generate(engine(family), family, on_event=stop)
    assert steps == [1]
    assert np.array_equal(generate(engine(family), family).frames, before.frames)


def test_sound_comes_along(engine: Open, tmp_path: Path) -> None:
    clip = generate(engine("ltx2"), "ltx2", seconds=0.25, frames=None)
    assert clip.num_frames == 6
    assert clip.sound.dtype == np.float32
    assert clip.sound.shape == (0.25 * 24_000, 2)
    assert clip.sound_rate == 24_000
    assert clip.sound.std() > 0
    saved = Clip.from_file(clip.save(tmp_path / "clip.mkv"))
    assert saved.num_frames == 6
    assert len(saved.sound) == 2 * len(clip.sound)  # Opus has 48 kHz
    assert saved.sound.std() > 0
    assert saved.recipe["plan"]["pipeline"] == "LTX2Pipeline"
    assert "target_lufs" in saved.recipe["encoder"]["sound"]


def test_a_models_sound_can_be_left_out_replaced_or_spoken_over(
    engine: Open, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"seconds": 0.5, "frames": None}
    own = generate(engine("ltx2"), "ltx2", **options, audio="generate")
    assert own.sound.std() > 0
    assert generate(engine("ltx2"), "ltx2", **options, audio="none").sound is None
    said = save(tmp_path / "said.wav", tone(0.2, 600))
    replaced = generate(engine("ltx2"), "ltx2", **options, audio=said)
    assert np.allclose(replaced.sound[:4800], tone(0.1, 600), atol=1e-3)
    spoken = generate(engine("ltx2"), "ltx2", **options, say=[(0.25, f"@{said}")])
    assert spoken.sound.shape == (24_000, 2)
    assert spoken.captions == [{"text": None, "start_s": 0.25, "end_s": 0.45}]
    heard = np.abs(np.fft.rfft(spoken.sound[13_000:21_000, 0]))
    assert heard.argmax() == 100
    with pytest.raises(InputError, match="makes no sound"):
        generate(engine("ltx"), "ltx", audio="generate")


def test_a_clip_that_feeds_on_its_own_frames(engine: Open) -> None:
    class Sectioned(diffusers.LTXPipeline):
        def __call__(  # a pipeline's signature
            self, prompt=None, height=32, width=64, num_frames=9, num_inference_steps=2,
            generator=None, output_type="np",
        ):
            sections = [
                super(Sectioned, self).__call__(
                    prompt, height=height, width=width, num_frames=num_frames,
                    num_inference_steps=num_inference_steps, generator=generator,
                    output_type=output_type,
                ).frames
                for _ in range(2)
            ]
            return SimpleOutput(np.concatenate(sections, axis=1))

    class SimpleOutput(tuple):
        __slots__ = ()

        def __new__(cls, frames):
            return super().__new__(cls, (frames,))

    ours = open_diffusers_model(engine("ltx").folder.path)
    ours.pipe.own = Sectioned(**ours.pipe.own.components)
    clip = generate(ours, "ltx")
    assert clip.num_frames == 9  # those asked for, of 18
    assert np.array_equal(clip.frames, generate(engine("ltx"), "ltx").frames)


@pytest.mark.parametrize("family", ["ltx", "ltx2", "skyreels_df"])
def test_a_picture_goes_to_the_pipeline_of_the_same_weights(engine: Open, family: str) -> None:
    plain, shown, other = (
        generate(engine(family), family, image=image) for image in (None, PICTURE, 255 - PICTURE)
    )
    assert shown.recipe["plan"]["pipeline"].endswith("ImageToVideoPipeline")
    assert shown.recipe["inputs"][0]["option"] == "image"
    assert not np.array_equal(plain.frames, shown.frames)
    assert not np.array_equal(other.frames, shown.frames)
    assert np.array_equal(generate(engine(family), family).frames, plain.frames)


def test_a_pictures_aspect_is_kept(engine: Open) -> None:
    tall = np.zeros((96, 32, 3), np.uint8)
    options = {**CASES["cogvideox_i2v"], "size": None, "image": tall, "steps": 1}
    clip = engine("cogvideox_i2v").generate(PROMPT, seed=1, **options)
    assert clip.size == (16, 48)


def test_a_clip_is_re_imagined(engine: Open, tmp_path: Path) -> None:
    source = generate(engine("cogvideox"), "cogvideox").save(tmp_path / "source.mkv")
    options = {"frames": None, "steps": 4, "video": source}
    near, far = (
        generate(engine("cogvideox"), "cogvideox", strength=strength, **options)
        for strength in (0.25, 1.0)
    )
    assert near.recipe["plan"]["pipeline"] == "CogVideoXVideoToVideoPipeline"
    assert near.num_frames == 9
    assert not np.array_equal(near.frames, far.frames)


def test_a_sampler_goes_through_the_same_noise_levels(engine: Open) -> None:
    from vidgen.pipeline.diffusers_backend.plan import make_scheduler

    own = engine("hunyuan").pipe.own.scheduler
    request = Request(prompt=PROMPT, sampler="unipc")
    swapped, sigmas = make_scheduler(own, request), np.linspace(1, 0, 5)[:-1]
    for scheduler in (own, swapped):
        scheduler.set_timesteps(sigmas=sigmas)
    assert torch.allclose(own.sigmas, swapped.sigmas, atol=1e-5)
    plain = generate(engine("hunyuan"), "hunyuan", steps=4)
    other = generate(engine("hunyuan"), "hunyuan", steps=4, sampler="unipc")
    assert not np.array_equal(plain.frames, other.frames)
    assert other.recipe["plan"]["sampler"] == "UniPCMultistepScheduler"
    assert engine("hunyuan").pipe.own.scheduler is own
    euler = generate(engine("skyreels"), "skyreels", sampler="euler", shift=3.0)
    plan = euler.recipe["plan"]
    assert (plan["sampler"], plan["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)


def test_guidance_reaches_the_component_that_guides(engine: Open) -> None:
    own = engine("hunyuan15").pipe.own.guider
    clips = [generate(engine("hunyuan15"), "hunyuan15", guidance=g) for g in (None, 6.0, 1.0)]
    assert np.array_equal(clips[0].frames, clips[1].frames)
    assert not np.array_equal(clips[1].frames, clips[2].frames)
    assert engine("hunyuan15").pipe.own.guider is own


@pytest.mark.parametrize("family", ["hunyuan_i2v", "mochi", "skyreels"])
def test_it_runs_in_bf16(models: Callable[[str], Path], family: str) -> None:
    ours = open_diffusers_model(models(family), dtype="bf16", offload="stage")
    clip = generate(ours, family)
    assert ours.pipe.own.transformer.dtype == torch.bfloat16
    assert clip.frames.std() > 1
    assert clip.recipe["dtype"] == "bf16"


def test_given_noise_replaces_the_seeds(engine: Open) -> None:
    noise = torch.randn(1, 4, 3, 4, 4)
    a, b = (generate(engine("hunyuan"), "hunyuan", seed=s, latents=noise) for s in (1, 2))
    assert np.array_equal(a.frames, b.frames)
    with pytest.raises(InputError, match="own layout"):
        generate(engine("hunyuan"), "hunyuan", latents=noise[:, :2])


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("ltx", {"mask": PICTURE, "image": PICTURE}, "mask can't be honoured by LTX.* takes"),
        ("ltx", {"reference": (PICTURE,)}, "reference can't be honoured"),
        ("ltx", {"sampler": "unipc"}, "sampler can't be honoured"),
        ("ltx", {"size": "48x32"}, "nearest are 32 and 64"),
        ("ltx", {"frames": 10}, "nearest are 9 and 17"),
        ("mochi", {"frames": 9}, "nearest are 7 and 13"),
        ("mochi", {"sampler": "unipc"}, "only with its own"),
        ("hunyuan", {"size": "40x32"}, "nearest are 32 and 48"),
        ("hunyuan", {"sampler": "dpm"}, "known: euler, unipc"),
        ("hunyuan", {"negative": "a cat"}, "its guidance is distilled"),
        ("hunyuan_i2v", {"image": None}, "give --image"),
        ("cogvideox", {"image": PICTURE}, "image can't be honoured by CogVideoXPipeline"),
        ("cogvideox", {"shift": 2.0}, "shift can't be honoured"),
        ("cogvideox", {"latents": torch.zeros(1, 3, 2, 4, 4)}, "own layout"),
        ("hunyuan15", {"size": "40x32"}, "nearest are 32 and 48"),
        ("sdxl", {"frames": 5}, "makes one picture"),
        ("sdxl", {"image": PICTURE}, "image can't be honoured"),
        ("flux", {"size": "40x32"}, "nearest are 32 and 48"),
        ("ltx", {"dtype": "bf16"}, "pass dtype to vidgen.load"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    engine: Open, family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(engine(family), family, **options)


def test_the_pipelines_own_check_names_the_nearest(engine: Open) -> None:
    from dataclasses import replace

    from vidgen.pipeline.diffusers_backend.plan import make_diffusers_plan

    ours = engine("ltx")
    pipe = ours.pipe.own
    request = Request.of(PROMPT, CASES["ltx"])
    able, step = Abilities(pipe), lambda _done, _total: None
    plan = make_diffusers_plan(request, Inputs(), able, pipe.scheduler)
    with pytest.raises(InputError, match="nearest are 32 and 64"):
        ours.pipe.make(able, replace(plan, width=48), pipe.scheduler,
                       {"prompt": PROMPT, "width": 48}, step)
    with pytest.raises(InputError, match="LTXPipeline refuses this: Provide either"):
        ours.pipe.make(able, plan, pipe.scheduler, {"prompt": None}, step)


def test_a_rate_that_the_model_does_not_know_is_said(
    engine: Open, caplog: pytest.LogCaptureFixture
) -> None:
    clip = generate(engine("cogvideox"), "cogvideox", fps=24)
    assert clip.fps == 24
    assert "8 fps" in caplog.text
    assert generate(engine("cogvideox"), "cogvideox").fps == 8


def test_damaged_and_unknown_folders(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = DiffusersFolder(tmp_path, {}, "TomorrowPipeline")
    with pytest.raises(ModelError, match=f"diffusers {diffusers.__version__} doesn't have"):
        DiffusersEngine(folder, torch.device("cpu"), "fp32")
    for place in ("vae", "text_encoder"):
        damaged = tmp_path / place
        shutil.copytree(models("ltx"), damaged)
        weights = next((damaged / place).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelError, match="copy it again"):
            open_diffusers_model(damaged)
        weights.unlink()
        with pytest.raises(ModelError, match="copy it again"):
            open_diffusers_model(damaged)
