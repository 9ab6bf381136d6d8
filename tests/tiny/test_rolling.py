"""Clips rolled out turn by turn: by a tiny model with a delta of random weights."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import pytest
import torch

from tests.lora_models import make_adapter
from tests.models import DEFAULTS, build_tiny_model
from tests.stopping import interrupt_behind
from train.toybox.model_files import write_student
from vidgen.cli.main import main
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.state import new_state
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.media.write import write_live
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.long.rolling import Rollout
from vidgen.pipeline.passes import count_passes
from vidgen.pipeline.plan import with_student
from vidgen.pipeline.setups import preflight
from vidgen.weights.folder import RollConfig, StudentConfig, write_model_info
from vidgen.weights.lora import write_lora

PROMPT = "a red car bounces across the desert"
SIGMAS = (1.0, 0.7, 0.4, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that makes sound, and has a roller: turns of two latent frames that see four."""
    folder = build_tiny_model(tmp_path_factory.mktemp("roller") / "tiny", sound=True)
    with load(str(folder), dtype="fp32").loader.use("transformer") as dit:
        adapter = make_adapter(dit)
    roll = RollConfig(turn_frames=2, window_frames=4, history_noise=0.2)
    write_student(adapter, StudentConfig("euler", SIGMAS, 3.0, roll=roll), folder)
    info = json.loads((folder / "model.json").read_text())
    write_model_info(folder, name="tiny", family="toybox", license_name="Apache-2.0",
                     tasks=tuple(info["tasks"]), defaults=DEFAULTS)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(str(folder), device="cpu", dtype="fp32")


def test_a_longer_clip_begins_as_the_shorter_one_does_and_needs_no_end(engine: Engine) -> None:
    short, long = (
        engine.generate(PROMPT, seed=3, roll=True, frames=frames).frames for frames in (21, 61)
    )
    assert short.shape == (21, 32, 32, 3)
    assert (long[:21] == short).all()
    again = engine.generate(PROMPT, seed=4, roll=True, frames=21).frames
    assert (again != short).any()
    endless = engine.generate(PROMPT, seed=3, roll=True, frames=99_997)
    seen = [len(chunk) for chunk in islice(endless.chunks(), 5)]
    assert sum(seen) < 30  # nothing is made that isn't asked for


def test_frames_do_not_depend_on_where_reading_begins(engine: Engine) -> None:
    clip = engine.generate(PROMPT, seed=3, roll=True, frames=33)
    whole = clip.frames
    for start in (1, 9, 22):
        rest = [frame for chunk in clip._source(start) for frame in chunk]
        assert len(rest) == 33 - start
        assert (torch.tensor(whole[start:]) == torch.stack([*map(torch.tensor, rest)])).all()


def test_turns_taken_in_at_once_are_those_taken_in_one_by_one(engine: Engine) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (1, engine.vae_config.latent_channels, 6, 4, 4)
    latents, noise = (torch.randn(shape, generator=draw) for _ in range(2))
    context = engine.encode_texts([PROMPT])
    roll = RollConfig(turn_frames=2, window_frames=6, history_noise=0.2)
    once, turns = (Rollout(context, roll, "euler") for _ in range(2))
    with torch.no_grad(), engine.loader.use("transformer") as dit, dit.causal(2):
        once.remember(dit, latents[:, :, :4], noise[:, :, :4])
        for part in (slice(0, 2), slice(2, 4)):
            turns.remember(dit, latents[:, :, part], noise[:, :, part])
        sigmas = torch.tensor(SIGMAS)
        state = new_state(noise[:, :, 4:])
        torch.testing.assert_close(
            *(each.turn(dit, state, sigmas) for each in (once, turns)),
            atol=1e-5, rtol=1e-4,
        )


def test_the_model_is_as_before_between_two_turns(engine: Engine) -> None:
    plain = engine.generate(PROMPT, seed=3, audio="none").frames
    chunks = engine.generate(PROMPT, seed=3, roll=True, frames=61).chunks()
    next(chunks)
    assert (engine.generate(PROMPT, seed=3, audio="none").frames == plain).all()
    next(chunks)


def test_a_first_frame_stands_and_adapters_add_up(
    engine: Engine, tmp_path: Path
) -> None:
    picture = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy()
    clip = engine.generate(PROMPT, seed=3, roll=True, frames=21, image=picture)
    still = engine.encode_video(
        torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    )
    decoded = next(iter(engine.decode_video(still)))
    shown = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert (torch.tensor(clip.frames[0]) == shown.permute(1, 2, 3, 0)[0]).all()
    with engine.loader.use("transformer") as dit:
        write_lora(make_adapter(dit), tmp_path / "own.safetensors", "vidgen")
    plain = engine.generate(PROMPT, seed=3, roll=True, frames=21).frames
    both = engine.generate(
        PROMPT, seed=3, roll=True, frames=21, lora=[str(tmp_path / "own.safetensors")]
    ).frames
    assert (both != plain).any()


def test_a_clip_that_was_cut_while_it_was_written_goes_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    options = {"seed": 3, "roll": True, "frames": 141}
    straight = engine.generate(PROMPT, **options)
    straight.save(tmp_path / "straight.mkv")
    path = tmp_path / "clip.mkv"
    clip = engine.generate(PROMPT, **options, journal=Journal(path))
    with pytest.raises(KeyboardInterrupt):
        clip.save(path, on_frames=interrupt_behind(100))
    again = engine.generate(PROMPT, **options, journal=Journal(path, resume=True))
    again.save(path)
    assert (Clip.from_file(path).frames == Clip.from_file(tmp_path / "straight.mkv").frames).all()
    recipe = read_recipe(path)
    assert recipe["plan"]["student"]["roll"] == {
        "turn_frames": 2, "window_frames": 4, "history_noise": 0.2
    }
    assert main(["replay", str(path), "-o", str(tmp_path / "again.mkv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]


def test_windows_go_on_from_the_last_frames_of_a_rolled_clip(
    engine: Engine, tmp_path: Path
) -> None:
    path, longer = tmp_path / "clip.mkv", tmp_path / "longer.mkv"
    engine.generate(PROMPT, seed=3, roll=True, frames=21).save(path)
    assert main(["extend", str(path), "--seconds", "0.5", "-o", str(longer), "--model",
                 str(engine.folder.path)]) == 0
    plan = read_recipe(longer)["plan"]
    assert plan["num_steps"] == engine.folder.defaults.num_steps
    assert plan["student"] is None
    frames = Clip.from_file(longer).frames
    assert (frames[:21] == Clip.from_file(path).frames).all()
    assert len(frames) == 27


def test_the_pre_flight_counts_turns(engine: Engine) -> None:
    request = Request(prompt=PROMPT, seed=3, roll=True, frames=41)
    plan = engine.plan(request, Inputs())
    counted = count_passes(engine.folder, plan, request)
    read = [window.frames for window in counted.windows]
    assert read == [2, 4, *[6] * (len(read) - 2)]
    assert counted.decoded == 2 * len(counted.windows) >= plan.latents.num_frames
    made = preflight(engine.loader, plan, request, engine.asked)
    assert "sound" not in [stage.name for stage in made.stages]


def test_it_is_piped_while_it_is_made(engine: Engine) -> None:
    clip = engine.generate(PROMPT, seed=3, roll=True, frames=41)
    pipe, sizes = io.BytesIO(), []
    assert write_live(pipe, clip.chunks(), clip.info, lambda _: sizes.append(pipe.tell())) == 41
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3
    pipe.seek(0)
    with av.open(pipe) as container:
        assert sum(1 for _ in container.decode(video=0)) == 41
        assert "vidgen" in str(container.metadata)

    class Closed(io.BytesIO):
        def write(self, data: object) -> int:
            if self.tell() > 4000:
                raise BrokenPipeError
            return super().write(data)

    assert write_live(Closed(), clip.chunks(), clip.info) < 41


def test_a_player_may_leave(folder: Path) -> None:
    command = [sys.executable, "-m", "vidgen", "generate", PROMPT, "--roll", "--seed", "3", "-o",
               "-", "--model", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(20_000)) == 20_000
        process.stdout.close()
        told = process.stderr.read().decode()
        assert (process.wait(timeout=60), told) == (0, "")


@pytest.mark.parametrize(("asked", "message"), [
    ({"steps": 8}, "the roller of 'tiny' takes 3"),
    ({"guidance": 3.0}, "guidance doesn't go with roll"),
    ({"negative": "a cat"}, "negative doesn't go with roll"),
    ({"last_image": "a.png"}, "last_image doesn't go with roll"),
    ({"audio": "generate"}, "a roller makes no sound"),
    ({"cache": "forecast"}, "no steps to spare"),
])  # fmt: skip
def test_what_a_roller_cannot_do_is_refused(
    engine: Engine, asked: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.plan(Request(prompt=PROMPT, roll=True, **asked), Inputs())


def test_a_model_without_a_roller_says_so(engine: Engine, folder: Path) -> None:
    bare = replace(engine.folder, roller=None)
    plan = engine.plan(Request(prompt=PROMPT, seed=1), Inputs())
    with pytest.raises(InputError, match="has no roller"):
        with_student(plan, Request(prompt=PROMPT, roll=True), bare)
    with pytest.raises(ValueError, match="less than the 3 of a turn"):
        RollConfig(3, 2)
    assert main(["generate", PROMPT, "-o", "-", "--model", str(folder)]) == 2
    assert main(["generate", PROMPT, "-o", "-", "--roll", "--json", "--model", str(folder)]) == 2
