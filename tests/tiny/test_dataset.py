"""Caches and batches of fine-tuning data, by tiny models of the real classes and real files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clips import film, moving
from tests.wan_models import build_diffusers
from vidgen.cli.main import main
from vidgen.core.errors import InputError, OutputError
from vidgen.core.runtime import best_dtype
from vidgen.media.clip import Clip
from vidgen.models.image import encode_image
from vidgen.models.text import TextEncoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.codec import encode_pixels
from vidgen.pipeline.inputs import pixels_of
from vidgen.pipeline.loader import DTYPES, ModelLoader
from vidgen.training.config import Bucket, DataConfig, FolderConfig
from vidgen.training.data.cache import component_hash, make_cache
from vidgen.training.data.dataset import open_dataset
from vidgen.training.data.survey import survey
from vidgen.weights.layouts import open_model

SIZE = (48, 32)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six clips of two lengths, one of them at twice the rate, and two pictures."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        film(folder / f"short{number}.mkv", moving(10, number, SIZE), codec="ffv1",
             pix_fmt="bgr0", caption=f"a red car {number}")
    for number in range(2):
        film(folder / f"long{number}.mp4", moving(17, 10 + number, SIZE), caption="a cat moves")
    film(folder / "fast.mp4", moving(34, 20, SIZE), 24, caption="a red car at night")
    for number in range(2):
        Image.fromarray(moving(1, 30 + number, SIZE)[0]).save(folder / f"still{number}.png")
    (folder / "captions.jsonl").write_text("".join(
        json.dumps({"file": f"still{number}.png", "caption": ["a cat", "the cat"]}) + "\n"
        for number in range(2)))
    return folder


def config_of(data: Path, **settings) -> DataConfig:
    return DataConfig(**{"folders": (FolderConfig(str(data)),), "sizes": ("48x32",),
                         "frames": (9, 17), "caption_dropout": 0.0, **settings})


def cached(config: DataConfig, model: Path, **options) -> dict:
    folder = open_model(str(model))
    known = survey(config, folder, lambda _: None)
    return make_cache(config, folder, str(model), known, lambda _: None, **options)


@pytest.fixture(scope="module")
def cache(data, tiny_model, tmp_path_factory) -> DataConfig:
    config = config_of(data, cache=str(tmp_path_factory.mktemp("c") / "cache"), store_dtype="fp32")
    made = cached(config, tiny_model)
    assert (made["items"], made["encoded"], made["captions"]) == (8, 8, 7)
    return config


def test_latents_are_what_the_vae_makes_of_the_frames(cache, data, tiny_model):
    dataset = open_dataset(cache, tiny_model, batch_size=1)
    parts = ModelLoader(open_model(str(tiny_model)), torch.device("cpu"), torch.float32)
    assert dataset.buckets == {Bucket(48, 32, 1): 2, Bucket(48, 32, 9): 3, Bucket(48, 32, 17): 3}
    for index, item in enumerate(dataset.items):
        batch = dataset.item_batch([index])
        if item.name.endswith("png"):
            frames = np.array(Image.open(data / item.name))[None]
        else:
            frames = Clip.from_file(data / item.name).frames
            frames = frames[:: 2 if item.name == "fast.mp4" else 1][: item.bucket.num_frames]
        video = pixels_of(list(frames), *SIZE, "crop")
        assert torch.allclose(batch["latents"], encode_pixels(parts, video), atol=1e-5)
        assert (batch["bucket"], batch["fps"], batch["files"]) == (item.bucket, 12.0, [item.name])
        if item.bucket.num_frames == 1:
            assert "stills" not in batch
            continue
        middle, last = item.bucket.num_frames // 2, item.bucket.num_frames - 1
        assert batch["still_index"].tolist() == [[middle, last]]
        alone = [encode_pixels(parts, video[:, :, n : n + 1]) for n in (middle, last)]
        assert torch.allclose(batch["stills"], torch.cat(alone, dim=2), atol=1e-5)


def test_contexts_are_those_of_generation(cache, tiny_model):
    dataset = open_dataset(cache, tiny_model, batch_size=3)
    folder = open_model(str(tiny_model))
    parts = ModelLoader(folder, torch.device("cpu"), DTYPES[best_dtype(torch.device("cpu"))])
    batch = dataset.batch(0)
    for row, caption in enumerate(batch["captions"]):
        with parts.use("text_encoder") as encoder:
            text = TextEncoder(encoder, PromptTokenizer(folder.tokenizer))
            context, (length,) = text.encode([caption])
        assert batch["context_lengths"][row] == length
        assert torch.allclose(batch["context"][row, :length], context[0].float(), atol=1e-6)
        assert not batch["context"][row, length:].any()
        assert batch["context_mask"][row].sum() == length


def test_without_a_cache_the_same_batches_come(cache, tiny_model):
    stored = open_dataset(cache, tiny_model, batch_size=2)
    fresh = open_dataset(replace(cache, cache="none"), tiny_model, batch_size=2)
    for step in range(3):
        one, other = stored.batch(step), fresh.batch(step)
        assert one.keys() == other.keys()
        assert one["files"] == other["files"]
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value, other[name], atol=1e-5), name
    fresh.close()


def test_ranks_and_micro_batches_share_a_step_out(cache, tiny_model):
    alone = open_dataset(cache, tiny_model, batch_size=1, accumulate=4, with_context=False)
    pairs = open_dataset(cache, tiny_model, batch_size=1, accumulate=2, with_context=False)
    for step in range(6):
        whole = [alone.batch(step, micro)["indices"] for micro in range(4)]
        parts = [pairs.batch(step, micro, rank, 2)["indices"]
                 for micro in range(2) for rank in range(2)]
        assert whole == parts
        assert {alone.items[i].bucket for (i,) in whole} == {alone.batch(step)["bucket"]}
    assert "context" not in alone.batch(0)


def test_an_epoch_tells_what_it_repeats_or_leaves_out(cache, tiny_model):
    dataset = open_dataset(cache, tiny_model, batch_size=2)
    assert dataset.steps_per_epoch() == 1 + 2 + 2
    seen = Counter(i for step in range(5) for i in dataset.batch(step)["indices"])
    assert set(seen) == set(range(8))
    assert len(dataset.ends()) == 2
    assert "1 clip repeats per epoch" in dataset.ends()[0]
    other = open_dataset(replace(cache, seed=1), tiny_model, batch_size=2)
    assert other.fingerprint != dataset.fingerprint
    assert open_dataset(cache, tiny_model, batch_size=2).fingerprint == dataset.fingerprint


def test_captions_drop_out_by_seed_and_several_take_turns(cache, tiny_model):
    config = replace(cache, caption_dropout=0.5)
    dataset = open_dataset(config, tiny_model, batch_size=1)
    drawn = [dataset.batch(step)["captions"][0] for step in range(60)]
    assert 15 < drawn.count("") < 45
    assert {"a cat", "the cat"} <= set(drawn)
    again = open_dataset(config, tiny_model, batch_size=1)
    assert [again.batch(step)["captions"][0] for step in range(60)] == drawn
    other = open_dataset(replace(config, seed=1), tiny_model, batch_size=1)
    assert [other.batch(step)["captions"][0] for step in range(60)] != drawn


def test_held_out_files_are_the_same_each_time_and_never_learned(cache, tiny_model):
    places = sorted(int(item.group, 16) / 2**256 for item in open_dataset(cache, tiny_model).items)
    config = replace(cache, held_out=(places[2] + places[3]) / 2)  # bytes vary by encoder
    dataset = open_dataset(config, tiny_model)
    kept = {item.sha256 for item in dataset.held_out.items}
    assert len(kept) == 3
    assert not kept & {item.sha256 for item in dataset.items}
    assert len(dataset.items) == 5
    assert open_dataset(config, tiny_model).held_out.items == dataset.held_out.items
    with pytest.raises(InputError, match=r"all 8 items are held out.*give a smaller share"):
        open_dataset(replace(cache, held_out=1.0), tiny_model)


def test_folders_repeat_and_one_validates(data, tiny_model, tmp_path):
    (tmp_path / "v").mkdir()
    film(tmp_path / "v" / "x.mp4", moving(9, 77, SIZE), caption="a cat")
    config = config_of(data, folders=(FolderConfig(str(data), 3),), validation=str(tmp_path / "v"))
    dataset = open_dataset(config, tiny_model, with_context=False)
    assert len(dataset.items) == 24
    assert [item.name for item in dataset.held_out.items] == ["x.mp4"]
    assert dataset.held_out.held_out is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ("32x32",)}, r"sizes was \['48x32'\], is \['32x32'\]"),
        ({"frames": (9,)}, "frames was"), ({"fps": Fraction(8)}, "fps was '12', is '8'"),
        ({"store_dtype": "bf16"}, "store_dtype was 'fp32'"),
        ({"windows": "all"}, "made with other settings.*windows was 1, is 'all'"),
        ({"prefix": "sks"}, "prefix was ''"), ({"cache": "elsewhere"}, "no finished cache"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache, tiny_model, settings, message):
    with pytest.raises(InputError, match=message):
        open_dataset(replace(cache, **settings), tiny_model)


def test_a_cache_of_another_model_is_refused(cache, tmp_path):
    wan = build_diffusers(tmp_path / "t2v", "t2v")
    with pytest.raises(InputError, match="vae was"):
        open_dataset(replace(cache, sizes=("48x32",)), wan)


def test_changed_files_are_reported_and_only_they_are_encoded_again(data, tiny_model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = config_of(folder, cache=str(tmp_path / "cache"))
    assert cached(config, tiny_model)["encoded"] == 8
    assert cached(config, tiny_model)["encoded"] == 0
    film(folder / "short0.mkv", moving(10, 50, SIZE), codec="ffv1", pix_fmt="bgr0")
    film(folder / "new.mp4", moving(9, 51, SIZE), caption="a cat")
    (folder / "long1.mp4").unlink()
    (folder / "fast.txt").write_text("a car in the rain")
    told = r"4 files .* were changed.* \(fast.mp4, long1.mp4, new.mp4, short0.mkv\)"
    with pytest.raises(InputError, match=told):
        open_dataset(config, tiny_model)
    made = cached(config, tiny_model)
    assert (made["items"], made["encoded"], made["texts_encoded"]) == (8, 2, 1)
    assert len(open_dataset(config, tiny_model).items) == 8
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert "folders don't exist" in open_dataset(config, tiny_model).notes[0]


def test_items_of_one_film_are_encoded_at_the_nearest_frames(tiny_model, tmp_path):
    (tmp_path / "data").mkdir()
    path = film(tmp_path / "data" / "a.mp4", moving(50, 0, SIZE), 20, caption="a cat")
    config = config_of(tmp_path / "data", frames=(9,), windows="all", store_dtype="fp32")
    config = replace(config, cache=str(tmp_path / "cache"))
    assert cached(config, tiny_model)["encoded"] == 3
    dataset = open_dataset(config, tiny_model, with_context=False)
    parts = ModelLoader(open_model(str(tiny_model)), torch.device("cpu"), torch.float32)
    frames = Clip.from_file(path).frames
    for index, item in enumerate(dataset.items):
        made = dataset.item_batch([index])["latents"]
        # 20 a second shown at 12: every 5/3rd frame, the nearest
        shown = [item.start + round(n * 5 / 3) for n in range(9)]
        video = pixels_of(list(frames[shown]), *SIZE, "crop")
        assert torch.allclose(made, encode_pixels(parts, video), atol=1e-5)


def test_a_disk_too_small_for_a_cache_is_reported_before_anything_is_encoded(
    data, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"may need .* only 100 bytes are free"):
        cached(config_of(data, cache=str(tmp_path / "cache")), tiny_model)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_damaged_and_missing_entries_are_reported(cache, tiny_model, tmp_path):
    shutil.copytree(cache.cache, tmp_path / "copy")
    config = replace(cache, cache=str(tmp_path / "copy"))
    dataset = open_dataset(config, tiny_model, batch_size=1)
    paths = sorted((tmp_path / "copy" / "latents").rglob("*.safetensors"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="is damaged"):
        dataset.batch(0)
    for path in paths:
        path.unlink()
    with pytest.raises(InputError, match="is missing from the cache"):
        dataset.batch(0)


def test_a_cache_that_is_none_is_refused(cache, tiny_model, tmp_path):
    shutil.copytree(cache.cache, tmp_path / "copy")
    config = replace(cache, cache=str(tmp_path / "copy"))
    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    for damaged in ([], {}, {**index, "items": 3}, {**index, "items": [{"x": 1}]},
                    {**index, "facts": 1}, {**index, "files": [[0, "a"]]},
                    {**index, "dropped": [1]}):
        (tmp_path / "copy" / "index.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=r"copy can't be read: .*; run vidgen data cache"):
            open_dataset(config, tiny_model)
    (tmp_path / "copy" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds other files than a cache; choose an empty"):
        cached(config, tiny_model)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; choose another folder"):
        cached(replace(cache, cache=str(tmp_path / "file")), tiny_model)
    with pytest.raises(OutputError, match="can't be written"):
        cached(replace(cache, cache=str(tmp_path / "file" / "below")), tiny_model)


def test_two_processes_make_the_same_cache(cache, tiny_model, tmp_path):
    config = replace(cache, cache=str(tmp_path / "cache"))
    cached(config, tiny_model, workers=2)

    def content(root: str) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*.safetensors")}

    one, two = content(cache.cache), content(config.cache)
    assert one.keys() == two.keys()
    differing = [name for name in one if one[name] != two[name]]
    assert differing == []


def test_latents_depend_on_the_image_processor(tmp_path):
    folder = open_model(str(build_diffusers(tmp_path / "i2v", "i2v")))
    before = component_hash(folder, "image_encoder")
    settings = folder.image_processor / "preprocessor_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert component_hash(folder, "image_encoder") != before


@pytest.mark.parametrize("variant", ["i2v", "flf2v", "vace", "ti2v-5b"])
def test_wan_models_get_what_their_conditions_need(data, tmp_path, variant):
    model = build_diffusers(tmp_path / variant, variant)
    folder = open_model(str(model))
    size = (64, 32) if variant == "ti2v-5b" else SIZE
    config = config_of(data, sizes=("{}x{}".format(*size),), frames=(9,), fps=Fraction(12),
                       max_enlarge=2.0, store_dtype="fp32", windows=1)
    config = replace(config, cache=str(tmp_path / "cache"))
    cached(config, model)
    dataset = open_dataset(config, model, batch_size=1)
    index = next(i for i, item in enumerate(dataset.items) if item.name == "short0.mkv")
    batch = dataset.item_batch([index])
    parts = ModelLoader(folder, torch.device("cpu"), torch.float32)
    frames = list(Clip.from_file(data / "short0.mkv").frames[:9])
    video = pixels_of(frames, *size, "crop")
    assert torch.allclose(batch["latents"], encode_pixels(parts, video), atol=1e-4)
    names = {name for name in ("first", "both", "grey", "image", "image_last", "stills")
             if name in batch}
    assert names == {"i2v": {"first", "image"}, "flf2v": {"first", "both", "image", "image_last"},
                     "vace": {"first", "both", "grey"}, "ti2v-5b": set()}[variant]
    known = torch.zeros_like(video)
    if "grey" in names:
        assert torch.allclose(batch["grey"], encode_pixels(parts, known), atol=1e-4)
    known[:, :, 0] = video[:, :, 0]
    if "first" in names:
        assert torch.allclose(batch["first"], encode_pixels(parts, known), atol=1e-4)
    known[:, :, -1] = video[:, :, -1]
    if "both" in names:
        assert torch.allclose(batch["both"], encode_pixels(parts, known), atol=1e-4)
    for name, frame in (("image", frames[0]), ("image_last", frames[8])):
        if name in names:
            with parts.use("image_encoder") as encoder, torch.no_grad():
                expected = encode_image(encoder, frame, parts.folder.image_processor,
                                        parts.device)
            assert torch.allclose(batch[name], expected, atol=1e-4)


def test_the_command_line_checks_and_caches(data, tiny_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.mp4").write_bytes(b"x" * 999)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    shape = ["--set", "data.sizes=48x32", "--set", "data.frames=[9, 17]", "--workers", "1",
             "--model", str(tiny_model)]
    argv = ["data", "check", str(folder), *shape]
    assert main([*argv, "--json"]) == 1, "a file was dropped"
    told = json.loads(capsys.readouterr().out)
    assert told["totals"] | {"seconds": 0} == {
        "files": 9, "dropped": 1, "items": 8, "seconds_used": 6.5, "seconds": 0}
    (broken,) = [row for row in told["files"] if row["dropped"]]
    assert broken["name"] == "broken.mp4"
    assert main(argv) == 1
    assert "9 files, 1 dropped; 8 items" in capsys.readouterr().out
    (folder / "broken.mp4").unlink()
    assert main(["data", "check", str(folder), *shape]) == 0
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {tiny_model}\ndata:\n  folders: {folder}\n  sizes: 48x32\n"
                   "  frames: [9, 17]\n")
    capsys.readouterr()
    assert main(["data", "cache", "-c", str(run), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["folder"], made["items"]) == (f"{folder}.cache", 8)
    config = DataConfig(folders=(FolderConfig(str(folder)),), sizes=("48x32",), frames=(9, 17),
                        cache=made["folder"])
    assert len(open_dataset(config, tiny_model).items) == 8
    run.write_text(run.read_text().replace(str(tiny_model), "nowhere") + "run:\n  folder: x\n")
    argv = ["data", "cache", "-c", str(run), "--json", "--set", f"model={tiny_model}"]
    assert main([*argv, "--set", "data.frames=[9, 17]", "--set", "run.steps=3"]) == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 0, "the same cache by the same model"
    assert main([*argv, "--set", "data.window=all"]) == 2
    assert "did you mean 'windows'" in capsys.readouterr().err
    assert main([*argv, "--set", "modle=x"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == {path: kept for path, kept in before.items() if path.name != "broken.mp4"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check"], "no folder was named"), (["check", "nowhere"], "nowhere is not a folder"),
        (["chek", "x"], "invalid choice"),
        (["check", ".", "--set", "data.fps=fast"], "fps must be"),
        (["check", ".", "--output", "x"], "--output has no meaning for data check"),
        (["check", ".", "--set", "data.avoid=[cuts]"], "did you mean 'cut'"),
        (["check", ".", "--set", "data=x"], "data is 'x'; give a mapping"),
        (["check", ".", "--workers", "0"], "give 1 or more"),
        (["check", ".", "--set", "data.folders=x"], "both name the data; give one of them"),
        (["check", ".", "--model", "nothing"], "neither an embedded model"),
    ],
)
def test_mistakes_are_reported(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *argv]) == 2
    assert message in capsys.readouterr().err
