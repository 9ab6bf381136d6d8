"""The pipeline on a tiny model: every condition, seeds, lengths, recipes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vidgen
from eval.toybox.generation import generate_batch
from tests.stopping import stop_at
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.core.request import Request
from vidgen.core.shapes import Tiles
from vidgen.media.clip import Clip
from vidgen.media.read import fit
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs, read_inputs, read_mask
from vidgen.pipeline.plan import make_plan

PROMPT = "a red car bounces across the desert"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rows = np.linspace(0, 255, 48, dtype=np.uint8)
    return np.stack([np.broadcast_to(rows, (32, 48)), np.full((32, 48), 90, np.uint8),
                     np.broadcast_to(rows[::-1], (32, 48))], axis=-1)


def taught(tiny_model: Path, **defaults: object) -> Engine:
    """The tiny model as one that has further defaults."""
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    engine.folder = replace(engine.folder, defaults=replace(engine.folder.defaults, **defaults))
    return engine


def latents(engine: Engine, **options: object) -> torch.Tensor:
    return engine.generate(PROMPT, seed=1, **options).latents


def test_the_same_seed_gives_the_same_frames(engine: Engine) -> None:
    first, again = (engine.generate(PROMPT, seed=3) for _ in range(2))
    other = engine.generate(PROMPT, seed=4)
    assert first.frames.shape == (9, 32, 32, 3)
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_a_clip_of_a_batch_equals_it_alone(engine: Engine) -> None:
    clips = engine.generate(PROMPT, seed=5, count=2)
    assert np.array_equal(clips[1].frames, engine.generate(PROMPT, seed=6).frames)


def test_guidance_one_is_the_conditional_pass(engine: Engine) -> None:
    plain = engine.generate(PROMPT, seed=1, guidance=1.0)
    with_negative = engine.generate(PROMPT, seed=1, guidance=1.0, negative="a cat")
    assert torch.equal(plain.latents, with_negative.latents)


def test_guidance_pulls_towards_given_frames_where_a_model_can_do_without(
    engine: Engine, tiny_model: Path, picture: np.ndarray
) -> None:
    other = taught(tiny_model, settings={"image_guidance": 3.0})
    plain, pulled = (latents(made, image=picture) for made in (engine, other))
    assert torch.equal(plain[:, :, :1], pulled[:, :, :1])
    assert not torch.equal(plain, pulled)
    assert torch.equal(latents(other, image=picture, settings={"image_guidance": 3.0}), pulled)
    assert not torch.equal(latents(other, image=picture, guidance=5.0), pulled)
    assert torch.equal(latents(other, image=picture, settings={"image_guidance": 1.0}),
                       latents(engine, image=picture, guidance=1.0))
    ends = {"last_image": picture}
    assert not torch.equal(latents(other, **ends), latents(engine, **ends, guidance=3.0))
    assert torch.equal(latents(other, **ends, settings={"image_guidance": 1.0}),
                       latents(engine, **ends, guidance=1.0))
    assert torch.equal(latents(other), latents(engine))
    assert torch.equal(latents(other, settings={"image_guidance": 9.0}), latents(engine))
    with pytest.raises(InputError, match=r"image_guidance is 2\.0, but this model has no separate"):
        latents(engine, image=picture, settings={"image_guidance": 2.0})


def test_guidance_towards_given_frames_may_grow_with_the_distance_from_them(
    engine: Engine, tiny_model: Path, picture: np.ndarray
) -> None:
    at_once = taught(tiny_model, settings={"image_guidance": 3.0})
    grows = taught(tiny_model, settings={"image_guidance": 3.0, "image_guidance_reach": 2})
    full, rising = (latents(made, image=picture) for made in (at_once, grows))
    assert not torch.equal(full, rising)
    assert torch.equal(latents(at_once, image=picture,
                               settings={"image_guidance_reach": 2}), rising)
    assert torch.equal(latents(grows, image=picture, settings={"image_guidance_reach": 0}), full)
    assert torch.equal(latents(grows), latents(at_once))
    recipe = grows.generate(PROMPT, seed=1, image=picture).recipe
    assert recipe["plan"]["guidance"]["reach"] == 2
    assert latents(engine, image=picture, settings={"image_guidance_reach": 0}) is not None
    with pytest.raises(InputError, match="image_guidance_reach is 2, but this model"):
        latents(engine, image=picture, settings={"image_guidance_reach": 2})


def test_guidance_may_pull_further_towards_references(
    engine: Engine, tiny_model: Path, picture: np.ndarray
) -> None:
    other = taught(tiny_model, settings={"reference_guidance": 2.0})
    plain, pulled = (latents(made, reference=[picture]) for made in (engine, other))
    assert not torch.equal(plain, pulled)
    assert torch.equal(latents(other, reference=[picture],
                               settings={"reference_guidance": 0}), plain)
    less = latents(other, reference=[picture], settings={"reference_guidance": 1.0})
    assert not torch.equal(less, pulled)
    # by these alone: the prompt's own scale is as before
    alone = latents(other, reference=[picture], guidance=1.0)
    assert not torch.equal(alone, latents(engine, reference=[picture], guidance=1.0))
    # what has no references, or shows its subject in frames, is as it was
    assert torch.equal(latents(other), latents(engine))
    both = {"reference": [picture], "image": picture}
    assert torch.equal(latents(other, **both), latents(engine, **both))
    assert torch.equal(latents(other, settings={"reference_guidance": 3.0}), latents(engine))
    with pytest.raises(InputError, match=r"reference_guidance is 2\.0, but this model has"):
        latents(engine, reference=[picture], settings={"reference_guidance": 2.0})
    shared = Request(prompt=PROMPT, reference=(picture,))
    assert make_plan(shared, other.folder, devices=2).guidance.reference_scale == 0
    with pytest.raises(InputError, match=r"reference_guidance is 1\.0, but guidance of references"):
        make_plan(shared.replace(settings={"reference_guidance": 1.0}), other.folder, devices=2)


def test_references_that_show_the_same_as_the_prompt_alone_pull_nowhere(
    tiny_model: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = taught(tiny_model, settings={"reference_guidance": 2.0})
    plain = latents(other, reference=[picture], settings={"reference_guidance": 0})
    monkeypatch.setattr("vidgen.pipeline.denoise.unshown", lambda state: state)
    assert torch.equal(latents(other, reference=[picture]), plain)


def test_a_step_cache_spares_the_pass_without_references_too(
    tiny_model: Path, picture: np.ndarray
) -> None:
    other = taught(tiny_model, settings={"reference_guidance": 2.0})
    options = {"reference": [picture], "steps": 8}
    plain = latents(other, **options)
    spared = latents(other, **options, cache="first-block:10")
    assert not torch.equal(plain, spared)
    assert torch.equal(latents(other, **options, cache="first-block:0"), plain)


def test_a_model_may_have_an_interval_of_guidance_of_its_own(
    engine: Engine, tiny_model: Path
) -> None:
    high = taught(tiny_model, guidance_interval=(0.9, 1.0))
    assert not torch.equal(latents(high), latents(engine))
    assert torch.equal(latents(high), latents(engine, guidance_interval=(0.9, 1.0)))
    assert torch.equal(latents(high, guidance_interval=(0.0, 1.0)), latents(engine))


def test_a_first_frame_comes_nearer_to_its_picture_by_steps_of_its_own(
    engine: Engine, tiny_model: Path, picture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    other = taught(tiny_model, settings={"refine": 8})
    plain, nearer = (latents(made, image=picture) for made in (engine, other))
    assert not torch.equal(plain[:, :, :1], nearer[:, :, :1])
    assert torch.equal(latents(other, image=picture, settings={"refine": 0}), plain)
    assert torch.equal(latents(other, frame=[(0, picture)]), nearer)
    ends = {"last_image": picture, "reference": [picture]}
    assert torch.equal(latents(other, **ends), latents(engine, **ends)), "no first frame"
    cut = [Engine(each.folder, each.device, each.loading.replace(tiles="2x2"))
           for each in (other, engine)]
    assert torch.equal(latents(cut[0], image=picture), latents(cut[1], image=picture))
    assert [r.message for r in caplog.records if "refine has no effect" in r.message]
    with pytest.raises(InputError, match="refine is 3, but this model doesn't refine first"):
        latents(engine, image=picture, settings={"refine": 3})


def test_what_is_given_may_be_encoded_in_several_passes(
    engine: Engine, tiny_model: Path, picture: np.ndarray
) -> None:
    video = torch.rand((1, 3, 9, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = engine.folder.components["vae"].load(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        once = wanted = vae.encode(video)
        for _ in range(2):  # half of what it shows, seen by the encoder, lacks of the clip
            wanted = wanted + 0.5 * (once - vae.encode(vae.decode(wanted).clamp(-1, 1)))
    torch.testing.assert_close(engine.encode_video(video), once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(engine.encode_video(video, passes=3), wanted, atol=1e-4, rtol=1e-4)
    whole, cut = (engine.encode_video(video, tiles, passes=2) for tiles in (None, Tiles(1, 1)))
    torch.testing.assert_close(whole, cut, atol=1e-4, rtol=1e-4)
    other = taught(tiny_model, settings={"encode_passes": 2})
    for given in ({"image": picture}, {"last_image": picture}, {"reference": [picture]}):
        assert not torch.equal(latents(other, **given), latents(engine, **given))
        assert torch.equal(latents(other, **given), latents(engine, **given,
                                                            settings={"encode_passes": 2}))
    assert torch.equal(latents(other), latents(engine))
    assert torch.equal(latents(other, image=picture, settings={"encode_passes": 1}),
                       latents(engine, image=picture))
    refined = {"encode_passes": 2, "refine": 4}
    assert torch.equal(latents(taught(tiny_model, settings=refined), image=picture),
                       latents(taught(tiny_model, settings={"refine": 4}), image=picture))
    assert other.generate(PROMPT, seed=1, image=picture).recipe["plan"]["encode_passes"] == 2
    with pytest.raises(InputError, match="encode_passes is 0; give a whole number from 1 to 100"):
        latents(engine, image=picture, settings={"encode_passes": 0})


def test_each_picture_of_a_batch_comes_nearer_by_itself(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand((3, 3, 1, 32, 32), generator=generator) * 2 - 1
    given = engine.encode_video(pictures)

    def errors(latents: torch.Tensor) -> torch.Tensor:
        shown = torch.cat(list(engine.decode_video(latents)), dim=2)
        return (shown - pictures).square().mean((1, 2, 3, 4))

    assert torch.equal(engine.encode_first(pictures, 0), given)
    before, some, more = (errors(engine.encode_first(pictures, n)) for n in (0, 4, 16))
    assert (some < before).all()
    assert (more < some).all()
    together = engine.encode_first(pictures, 4)
    alone = torch.cat([engine.encode_first(each, 4) for each in pictures.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert not together.requires_grad


def test_the_prompt_matters(engine: Engine) -> None:
    a, b = (engine.generate(text, seed=1) for text in (PROMPT, "a cat over the meadow"))
    assert not torch.equal(a.latents, b.latents)


def test_seconds_generate_the_next_count_and_trim(engine: Engine) -> None:
    clip = engine.generate(PROMPT, seed=1, seconds=0.5)
    assert clip.num_frames == 6
    assert clip.latents.shape[2] == 3
    assert len(clip.frames) == 6


def test_streamed_chunks_equal_whole_decode(engine: Engine) -> None:
    clip = engine.generate(PROMPT, seed=2)
    with engine.loader.use("vae") as vae:
        whole = vae.decode(clip.latents).clamp(-1, 1)
    frames = ((whole[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    difference = np.abs(frames.astype(int) - clip.frames.astype(int))
    assert difference.max() <= 1


def known(engine: Engine, **options: object) -> tuple[torch.Tensor, torch.Tensor, object]:
    """The state's known mask, its clean values and the plan of a request."""
    request = Request.of(PROMPT, {"seed": 1, **options})
    inputs = read_inputs(request)
    plan = engine.plan(request, inputs)
    state = engine.prepare(plan, request, inputs)
    return ~state.denoise_mask, state, plan


def test_the_first_frame_is_kept_exactly(engine: Engine, picture: np.ndarray) -> None:
    mask, state, _ = known(engine, image=picture, size="32x32")
    assert mask[:, :, 0].all()
    assert not mask[:, :, 1:].any()
    clip = engine.generate(PROMPT, seed=1, image=picture, size="32x32")
    assert torch.equal(clip.latents[:, :, :1], state.clean[:, :, :1])


def test_a_pictures_aspect_is_kept(engine: Engine, picture: np.ndarray) -> None:
    clip = engine.generate(PROMPT, seed=1, image=picture)
    assert clip.size[0] > clip.size[1]


@pytest.mark.parametrize(("option", "position"), [("last_image", 2.375), ("reference", -4.0)])
def test_stills_join_as_tokens(
    engine: Engine, picture: np.ndarray, option: str, position: float
) -> None:
    value = (picture,) if option == "reference" else picture
    mask, state, _ = known(engine, **{option: value}, size="32x32")
    assert not mask.any()
    assert state.keys.positions.tolist() == [[position]]
    plain = engine.generate(PROMPT, seed=1)
    shown = engine.generate(PROMPT, seed=1, size="32x32", **{option: value})
    assert not torch.equal(plain.latents, shown.latents)


def test_frames_at_any_time(engine: Engine, picture: np.ndarray) -> None:
    mask, state, _ = known(engine, frame=((0.0, picture), (0.5, picture)), size="32x32")
    assert mask[:, :, 0].all()
    assert state.keys.positions.tolist() == [[1.875]]


def test_strength_zero_is_the_reconstruction_and_one_is_text(
    engine: Engine, tmp_path: Path
) -> None:
    source = tmp_path / "source.mkv"
    engine.generate(PROMPT, seed=9).save(source)
    pixels = torch.from_numpy(vidgen.Clip.from_file(source).frames).permute(3, 0, 1, 2)[None]
    with engine.loader.use("vae") as vae:
        encoded = vae.encode(pixels.float() / 127.5 - 1)
    kept = engine.generate(PROMPT, seed=1, video=str(source), strength=0.0)
    assert torch.allclose(kept.latents, encoded, atol=1e-5)
    free = engine.generate(PROMPT, seed=1, video=str(source), strength=1.0)
    assert torch.equal(free.latents, engine.generate(PROMPT, seed=1).latents)


def test_a_mask_keeps_the_rest(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "source.mkv"
    engine.generate(PROMPT, seed=9).save(source)
    white_left = np.zeros((32, 32, 3), np.uint8)
    white_left[:, :16] = 255
    mask, state, _ = known(engine, video=str(source), mask=white_left)
    assert mask[..., 2:].all()
    assert not mask[..., :2].any()
    clip = engine.generate(PROMPT, seed=1, video=str(source), mask=white_left)
    assert torch.equal(clip.latents[..., 2:], state.clean[..., 2:])


def test_noise_that_is_redrawn_follows_from_the_seed_alone(
    engine: Engine, tmp_path: Path
) -> None:
    def made(**options: Any) -> torch.Tensor:
        clip = engine.generate(PROMPT, **{"seed": 1, "steps": 4, "sampler": "ancestral"} | options)
        assert clip.latents is not None
        return clip.latents

    first = made()
    assert torch.equal(first, made())
    assert not torch.equal(first, made(seed=2))
    assert not torch.allclose(first, made(sampler="euler"), atol=0.1)
    batch = generate_batch(
        engine, engine.plan(Request(prompt=PROMPT, seed=0, steps=4, sampler="ancestral"), Inputs()),
        [PROMPT] * 2, [5, 1],
    )
    alone = torch.cat(list(engine.decode_video(first)), dim=2)[0]
    torch.testing.assert_close(batch[1], alone.clamp(-1, 1), atol=1e-3, rtol=0)
    source = tmp_path / "source.mkv"
    engine.generate(PROMPT, seed=9).save(source)
    assert torch.equal(first, made(video=str(source), strength=1.0))
    half = made(video=str(source), strength=0.5)
    assert torch.equal(half, made(video=str(source), strength=0.5))
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, :16] = 255
    kept = made(video=str(source), mask=left)
    whole = made(video=str(source), strength=0.0)
    torch.testing.assert_close(kept[..., 2:], whole[..., 2:], atol=1e-4, rtol=0)


def test_given_noise_replaces_the_seeds(engine: Engine) -> None:
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    a, b = (engine.generate(PROMPT, seed=s, latents=noise) for s in (1, 2))
    assert torch.equal(a.latents, b.latents)
    with pytest.raises(InputError, match="latents are"):
        engine.generate(PROMPT, latents=noise[:, :, :2])


def test_a_still_is_a_clip_of_one_frame(engine: Engine, tmp_path: Path) -> None:
    path = engine.generate(PROMPT, seed=1, frames=1).save(tmp_path / "still.png")
    assert path.stat().st_size > 0


def test_the_recipe_travels_in_the_file(engine: Engine, tmp_path: Path) -> None:
    path = engine.generate(PROMPT, seed=7).save(tmp_path / "clip.mp4")
    recipe = vidgen.Clip.from_file(path).recipe
    assert recipe["plan"]["prompt"] == PROMPT
    assert recipe["plan"]["seed"] == 7
    assert recipe["model"]["sha256"] == engine.folder.content_hash
    json.dumps(recipe)


def test_raising_cancelled_stops(engine: Engine) -> None:
    with pytest.raises(Cancelled):
        engine.generate(PROMPT, on_event=stop_at(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 10}, "nearest are 9 and 13"),
        ({"size": "40x32"}, "nearest are 32 and 48"),
        ({"sampler": "eulr"}, "euler"),
        ({"frame": ((9.0, np.zeros((32, 32, 3), np.uint8)),)}, "after the clip's last one"),
        ({"video": "nowhere.mp4", "strength": 0.5}, "does not exist"),
    ],
)
def test_what_the_model_cant_do_is_refused(
    engine: Engine, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(PROMPT, **options)


def test_unseen_sizes_and_unknown_words_are_warned_about(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.generate("a zebra bounces", seed=1, size="48x32")
    assert "wasn't trained at 48x32" in caplog.text
    assert "'zebra'" in caplog.text


def test_damaged_folders_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = folder / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        load(str(folder), device="cpu")
    shutil.copy(folder / "vae" / "model.safetensors", weights)
    with pytest.raises(ModelError, match=r"missing .* surplus"):
        load(str(folder), device="cpu")
    weights.unlink()
    with pytest.raises(ModelError, match="incomplete"):
        load(str(folder), device="cpu")
    with pytest.raises(ModelError, match="neither an embedded model"):
        load(str(tmp_path / "nowhere"))


def test_a_masked_picture_is_repainted_where_white(engine: Engine, picture: np.ndarray) -> None:
    white_left = np.zeros((32, 32, 3), np.uint8)
    white_left[:, :16] = 255
    for frames in (1, 9):
        mask, state, _ = known(
            engine, image=picture, mask=white_left, size="32x32", frames=frames
        )
        assert mask[..., 2:].all()
        assert not mask[..., :2].any()
        clip = engine.generate(
            PROMPT, seed=1, image=picture, mask=white_left, size="32x32", frames=frames
        )
        assert torch.equal(clip.latents[..., 2:], state.clean[..., 2:])
        assert clip.first_frame is None, "most of it was to become another"
    clip = engine.generate(PROMPT, seed=1, image=picture, size="32x32", frames=5)
    assert np.array_equal(clip.first_frame, fit(picture, 32, 32, "crop"))


def test_a_mask_clip_keeps_step_with_the_clip(engine: Engine, tmp_path: Path) -> None:
    """White for the first 0.75 s at twice the clip's rate; the last frame holds for what is cut."""
    video, mask = tmp_path / "v.mkv", tmp_path / "m.mkv"
    engine.generate(PROMPT, seed=9, frames=9).save(video)
    frames = np.zeros((36, 32, 32, 3), np.uint8)
    frames[:18] = 255
    write_clip(mask, [frames], ClipInfo(Fraction(24), (32, 32), 36))
    plan = engine.plan(Request(prompt=PROMPT, seconds=1.5), Inputs())
    assert (plan.kept_frames, plan.num_frames) == (18, 21)
    shown = read_mask(str(mask), plan)[0, 0, :, 0, 0]
    assert shown.tolist() == [1.0] * 9 + [0.0] * 12
    longer = engine.plan(Request(prompt=PROMPT, seconds=2), Inputs())
    with pytest.raises(InputError, match="has 18 frames at 12 fps, the clip has 24; give"):
        read_mask(str(mask), longer)


def test_a_mask_that_moves_may_be_an_animation(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stills = [Image.new("RGB", (32, 32), colour) for colour in ("white", "white", "black")]
    stills[0].save(tmp_path / "m.gif", save_all=True, append_images=stills[1:], duration=80)
    plan = engine.plan(Request(prompt=PROMPT, frames=5), Inputs())
    with pytest.raises(InputError, match="has 3 frames"):
        read_mask(str(tmp_path / "m.gif"), plan)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_mask(str(tmp_path / "clear.png"), plan).min() == 1
    assert "clear.png: transparent parts composited over white" in caplog.text


@pytest.mark.parametrize(("options", "message"), [
    ({"seconds": 0.5, "frame": 0.6}, "frame is at 0.6 s, after the clip's last one at 0.417 s"),
    ({"frames": 1, "image": "x"}, "image leaves nothing to generate in a clip of one frame"),
    ({"frames": 1, "last_image": "x"}, "last_image leaves nothing"),
    ({"frames": 4001, "fps": 1}, "4001 frames at 1 fps last 4001 s; .* 3600 s at most"),
    ({"latents": np.zeros((1, 4, 3, 4, 4))}, "latents are a ndarray; give a torch tensor"),
    ({"latents": torch.full((1, 4, 3, 4, 4), math.nan)}, "latents have NaN or infinite values"),
])
def test_what_a_clip_cannot_have_is_refused(
    engine: Engine, picture: np.ndarray, options: dict[str, Any], message: str
) -> None:
    given = {name: picture if isinstance(value, str) else value for name, value in options.items()}
    if "frame" in given:
        given["frame"] = ((given["frame"], picture),)
    with pytest.raises(InputError, match=message):
        engine.generate(PROMPT, seed=1, **given)


def test_options_change_a_request(engine: Engine) -> None:
    request = Request(prompt=PROMPT, frames=5, seed=2)
    clip = engine.generate(prompt=request, seed=3)
    assert (clip.num_frames, clip.recipe["plan"]["seed"]) == (5, 3)


def test_a_clip_continues_from_another(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "source.mkv"
    engine.generate(PROMPT, seed=9, frames=9).save(source)
    clip = engine.generate(PROMPT, seed=1, prefix=str(source), frames=17)
    assert len(clip.frames) == 17
    assert np.array_equal(clip.frames[:9], Clip.from_file(source).frames)
    with pytest.raises(InputError, match="leaves nothing to generate"):
        engine.generate(PROMPT, seed=1, prefix=str(source), frames=9)
