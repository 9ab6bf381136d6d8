import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from vidgen.core.errors import InputError
from vidgen.core.request import CALLED, Loading, Request, Saving


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n\t"}, "the prompt is empty"),
        ({"prompt": "a" * 20_001}, "prompt has 20001 characters; shorten it to 20000"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": None}, "prompt must be text"),
        ({"negative": "n" * 30_000}, "negative has 30000 characters"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"frames": 0}, "frames is 0; give a whole number from 1"),
        ({"frames": -3}, "frames is -3"),
        ({"seconds": 0}, "seconds is 0; give a number above 0"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": math.inf}, "seconds is inf; .* 3600 at most"),
        ({"seconds": 2, "frames": 9}, "seconds and frames are both given"),
        ({"fps": 0}, "fps is 0; give a number from 1 to 240"),
        ({"fps": "1/0"}, "fps is '1/0'; give a number, or a fraction such as 24000/1001"),
        ({"fps": math.nan}, "fps is nan"),
        ({"fps": "1/1000"}, "fps is '1/1000'; give a number from 1 to 240"),
        ({"fps": True}, "fps is True"),
        ({"prompt": "a \ud800 cat"}, "prompt contains .*half of a character"),
        ({"negative": "\udcff"}, "negative contains"),
        ({"say": [(0, "\ud800")]}, "say contains"),
        ({"image": 5}, "image is 5; give the path of a file, a Pillow image, or"),
        ({"video": np.zeros((2, 8, 8, 3))}, r"video is array\(\[\[.*; give the path of a file"),
        ({"mask": b"x"}, "mask is b'x'; give the path"),
        ({"reference": 5}, "reference is 5; give a picture or a list of pictures"),
        ({"reference": ["a.png", 5]}, r"reference is \['a.png', 5\]; give a picture"),
        ({"frame": 5}, "frame is 5; give a list of pairs"),
        ({"lora": 5}, "lora is 5; give PATH or PATH:WEIGHT, or a list"),
        ({"lora": [5]}, r"lora is \[5\]"),
        ({"say": 5}, "say is 5; give a list of texts or pairs"),
        ({"sampler": 5}, "sampler is 5; give a name, or one of diffusers' flow schedulers"),
        ({"follow_audio": "no"}, "follow_audio is 'no'; give True or False"),
        ({"audio_loop": "x"}, "audio_loop is 'x'"),
        ({"settings": 5}, "settings is 5; give a mapping, or a list of KEY=VALUE"),
        ({"settings": ["candidates"]}, "settings contains 'candidates'; give KEY=VALUE"),
        ({"settings": {"refine": "x"}}, "refine is 'x'; give a number, true or false"),
        ({"settings": {5: 1}}, "settings has the name 5"),
        ({"settings": None}, "settings is None; leave it out, or give a value"),
        ({"model": 5}, "model is not an option of a clip; pass model to vidgen.load"),
        ({"torch_dtype": "bf16"}, "is not an option of a clip; pass dtype to vidgen.load"),
        ({"count": 2}, "count is not an option of a clip; pass it to generate"),
        ({"num_videos_per_prompt": 2}, "is not an option of a clip; pass it to generate"),
        ({"label": "visible"}, "label is not an option of a clip; pass it to save: clip.save"),
        ({"tiles": "2x2"}, "tiles is not an option of a clip; pass tiles to vidgen.load"),
        ({"fps": 1000}, "fps is 1000; give a number from 1 to 240"),
        ({"size": "128"}, "size is '128'; give width and height"),
        ({"size": "0x128"}, "size is 0; give a whole number from 16 to 8192"),
        ({"size": (128, 100000)}, "size is 100000"),
        ({"size": (128,)}, "give width and height"),
        ({"fit": "stretch"}, "fit is 'stretch'; known: crop, pad"),
        ({"steps": 0}, "steps is 0; give a whole number from 1 to 1000"),
        ({"steps": True}, "steps is True"),
        ({"guidance": math.nan}, "guidance is nan; give a number from 0 to 100"),
        ({"guidance": -1}, "guidance is -1"),
        ({"guidance": "high"}, "guidance is 'high'"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.2, math.nan)}, "guidance_interval"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; give a number from 0 to 1"),
        ({"shift": 0}, "shift is 0; give a number above 0"),
        ({"strength": 0.5}, "strength needs video"),
        ({"strength": 1.1, "video": "a.mp4"}, "strength is 1.1"),
        ({"mask": "m.png"}, "mask needs video or image"),
        ({"frame": ["a.png"]}, r"frame is \['a.png'\]; give a list of pairs"),
        ({"frame": [(-1, "a.png")]}, "frame is -1; give a number from 0"),
    ],
)
def test_bad_values_are_refused_with_value_limit_and_remedy(options, message):
    with pytest.raises(InputError, match=message):
        Request(**{"prompt": "a cat", **options})


def test_bad_values_of_loading_are_refused_alike():
    for options, message in (
        ({"model": 5}, "model must be text, not 5"), ({"devices": 0}, "devices is 0; give a"),
        ({"attention": "flash9"}, "attention is 'flash9'; "), ({"tiles": "2"}, "tiles is '2'"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; did you mean 'fp"), ({"shard": 1}, "give True"),
    ):
        with pytest.raises(InputError, match=message):
            Loading(**options)


def test_bad_values_of_saving_are_refused_alike():
    for options, message in (
        ({"strict": "no"}, "strict is 'no'; give True or False"),
        ({"count": None}, "count is None; leave it out, or give a value"),
        ({"count": 0}, "count is 0; give a whole number from 1"),
        ({"label": "big"}, "label is 'big'; known: none, visible"),
    ):
        with pytest.raises(InputError, match=message):
            Saving(**options)
    with pytest.raises(InputError, match="latents are the noise of one clip, but count is 2"):
        Request.of("a cat", {"latents": np.zeros(3)}, 2)
    with pytest.raises(InputError, match="count is 0; give a whole number from 1 to 1000"):
        Request.of("a cat", {}, 0)


def test_a_misspelt_option_names_the_nearest():
    with pytest.raises(InputError, match="unknown option 'sede'; did you mean 'seed'"):
        Request.of("a cat", {"sede": 3})
    assert Request.of("a cat", {"seed": 3}) == Request(prompt="a cat", seed=3)


@pytest.mark.parametrize(("theirs", "ours"), [
    ("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("height", "size"),
    ("generator", "seed"), ("negative_prompt", "negative"), ("flow_shift", "shift"),
])
def test_what_other_programs_call_an_option_is_reported_by_our_name(theirs, ours):
    with pytest.raises(InputError, match=f"unknown option '{theirs}'; did you mean '{ours}'"):
        Request.of("a cat", {theirs: 1})


def test_other_programs_names_mean_options_that_there_are():
    ours = {*Request.model_fields, *Loading.model_fields, *Saving.model_fields}
    assert set(CALLED.values()) <= ours
    assert not set(CALLED) & ours


def test_pictures_of_pillow_are_taken_where_nothing_has_to_be_interpreted():
    picture = Image.new("RGB", (8, 6), (250, 20, 10))
    grey = Image.new("L", (8, 6), 7)
    made = Request(prompt="x", image=picture, frame=[(1, grey)], reference=[grey, "a.png"])
    assert made.image.shape == (6, 8, 3)
    assert made.image[0, 0].tolist() == [250, 20, 10]
    assert made.frame[0][1][0, 0].tolist() == made.reference[0][0, 0].tolist() == [7, 7, 7]
    assert made.reference[1] == "a.png"
    assert Request(prompt="x", reference=picture).reference[0].dtype == np.uint8
    with pytest.raises(InputError, match=r"has the mode RGBA; give image.convert\('RGB'\)"):
        Request(prompt="x", image=picture.convert("RGBA"))
    picture.getexif()[0x0112] = 6
    with pytest.raises(InputError, match=r"is rotated by its EXIF data; give .*exif_transpose"):
        Request(prompt="x", last_image=picture)


def test_values_are_brought_to_one_form():
    request = Request(
        prompt="a cat", size="160x96", fps=12, frame=[[1, "a.png"]], reference="r.png",
        guidance_interval=[0, 1],
    )
    assert request.size == (160, 96)
    assert request.fps == Fraction(12)
    assert request.frame == ((1, "a.png"),)
    assert request.reference == ("r.png",)
    assert request.guidance_interval == (0.0, 1.0)


def test_numbers_of_other_libraries_are_taken_as_pythons_own():
    request = Request(
        prompt="a cat", seed=np.int64(5), guidance=np.float32(2), size=np.array([160, 96]),
        fps=np.float64(23.976), audio="a.wav", audio_loop=np.bool_(True),
        frame=[(np.float64(0.5), "a.png")],
    )
    kinds = (request.seed, request.guidance, *request.size, request.audio_loop, request.frame[0][0])
    assert [type(value) for value in kinds] == [int, float, int, int, bool, float]
    assert request.fps == Fraction(24000, 1001)


def test_a_request_may_be_changed_by_options():
    request = Request(prompt="a cat", frames=5, seed=2)
    assert Request.of(request, {"seed": 77, "frames": 9}) == Request(
        prompt="a cat", frames=9, seed=77)
    with pytest.raises(InputError, match="unknown option 'sead'; did you mean 'seed'"):
        Request.of(request, {"sead": 1})
    with pytest.raises(InputError, match=r"is not an option of a clip; .* clip.save\(PATH, ov"):
        Request.of("a cat", {"overwrite": True})


@pytest.mark.parametrize(
    ("given_fps", "meant"),
    [
        (23.976, Fraction(24000, 1001)), (29.97, Fraction(30000, 1001)), (12.5, Fraction(25, 2)),
        ("24000/1001", Fraction(24000, 1001)), (24.0, Fraction(24)),
        ("59.94", Fraction(60000, 1001)),
    ],
)
def test_frame_rates_are_exact(given_fps, meant):
    assert Request(prompt="a cat", fps=given_fps).fps == meant


def test_a_request_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Request(prompt="a cat").seed = 3


@given(
    prompt=st.text(min_size=1, max_size=50).filter(str.strip),
    seed=st.integers(0, 2**63 - 1),
    guidance=st.floats(0, 100),
    size=st.tuples(st.integers(16, 8192), st.integers(16, 8192)),
    fps=st.fractions(Fraction(1), 240, max_denominator=1001),
)
def test_a_dumped_request_makes_the_same_request(prompt, seed, guidance, size, fps):
    request = Request(prompt=prompt, seed=seed, guidance=guidance, size=size, fps=fps)
    assert Request(**request.model_dump(exclude_unset=True)) == request
