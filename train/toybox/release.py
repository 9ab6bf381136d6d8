"""Put trained weights into a model folder: averaged, bf16 or int8, with the facts they need.

    python -m train.toybox.release vae       --run runs/vae --out vidgen/assets/toybox
    python -m train.toybox.release tokenizer --out vidgen/assets/toybox
    python -m train.toybox.release dit
        --run runs/dit --out vidgen/assets/toybox [--mix FOLDER=SHARE]
                                      [--keep-students]
    python -m train.toybox.release sound     --run runs/sound --out vidgen/assets/toybox
    python -m train.toybox.release student   --run runs/student --out vidgen/assets/toybox
    python -m train.toybox.release verifier  --run runs/verifier --out vidgen/assets/toybox
    python -m train.toybox.release onset_detector --run runs/onset_detector --out FOLDER

`vae` and `sound` measure the latents' mean and deviation on fresh clips, unless encoder or decoder
stayed as it was (`part`), or latents were kept near what they were (`loss.keep`). `dit` of a run
whose `levels` end below 1 is the expert at low noise, which takes over there. Students of the old
weights are removed, but for `--keep-students`: near the old weights they may serve on, score them;
a verifier and an onset detector of other latents always are.
Clips come with sound once its run had `sound`; `--mix` averages its weights with those of releases
that it began with (Wortsman et al. 2022). Each call writes `model.json` anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.toybox.distillation.config import LOW, DeltaConfig, TrajectoryConfig
from train.toybox.distillation.delta import adapter_of
from train.toybox.model_files import save_module, write_few_step
from train.toybox.sound_vae import SOUND_VAE
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.tokenizer import train_tokenizer
from train.toybox.tasks.toybox_data import CacheConfig, encoder_hash
from train.toybox.tasks.verifier_data import COLOURS, LABELS
from train.toybox.world.captions import caption
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, sample_scenes
from train.toybox.world.sound import synthesize
from train.toybox.world.synonyms import grammar_synonyms
from train.toybox.world.thesaurus import loose_vocabulary
from vidgen.core.config import build
from vidgen.core.errors import InputError, ModelError, exit_code
from vidgen.core.runtime import atomic_write, best_dtype, sha256_file
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.models.onset_detector import OnsetDetectorConfig
from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS, TEXT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.models.verifier import VerifierConfig
from vidgen.models.words import split_words
from vidgen.pipeline.best_of_n import VERIFIER
from vidgen.pipeline.settings import SOUND as SOUND_TASK
from vidgen.pipeline.sound.own_sound import ONSET_DETECTOR
from vidgen.pipeline.tail import ANCHOR_TASK
from vidgen.training.checkpoint import latest_checkpoint, load_averages
from vidgen.training.data.survey import open_trainable
from vidgen.weights.configs import config_of, encoder_to_transformers
from vidgen.weights.family import ModelDefaults
from vidgen.weights.folder import FEW_STEP, FewStepConfig, write_model_info
from vidgen.weights.layouts import open_few_step, open_model
from vidgen.weights.store import open_tensors

DEFAULTS = ModelDefaults(
    num_steps=12, shift=5.0, guidance_scale=4.0, fps=12.0, num_frames=33, height=128, width=128,
    sampler="ancestral", sizes=((128, 128), (176, 96), (96, 176)), max_frames=33,
    guidance_interval=(0.32, 1.0),
    settings={
        "image_guidance": 3.0, "image_guidance_reach": 3, "reference_guidance": 1.0, "refine": 12,
        "encode_passes": 2,
        "audio_steps": 6, "audio_candidates": 6, "audio_delay": 0.015,  # docs/lab/experiments.md
    },
)
TASKS = ("text", "image", "last-image", "frames", "extend", "mask", "video", "reference", "still")
HISTORY_NOISE = 0.25  # of 0, 0.1 and 0.25 it keeps sprites best (docs/lab/experiments.md)
INT8_FROM = 1 << 15  # numbers of a matrix; those that latents come and go through are smaller
SMALL_INT8_FROM = 1 << 13  # of small networks, which are off by as much as by bf16
VERIFIED: dict[str, float] = {"candidates": 4, "regional_prompts": 1.0}
"""What a model draws by that has a verifier (docs/lab/experiments.md, "a verifier")."""
LOOKING: dict[str, float] = {"audio_candidates": 12}
"""And that has an onset detector ("somebody looks who listens")."""
PARTS = ("vae/model.safetensors", "transformer/model.safetensors",
         "text_encoder/model.safetensors", "tokenizer/tokenizer.json")
NUM_STATISTICS_CLIPS = 128
NUM_CAPTIONS = 60_000


def release_vae(run: Path, out: Path) -> None:
    """The VAE of a run; what reads other latents goes."""
    if _moves_latents(_run_settings(run)):
        for part in (VERIFIER, ONSET_DETECTOR):
            shutil.rmtree(out / part, ignore_errors=True)
    _release_autoencoder(run, out / "vae", CausalVAE, VAE_PRESETS, measure_latents)


def release_sound(run: Path, out: Path) -> None:
    """The sound VAE of a run."""
    _release_autoencoder(run, out / SOUND_VAE, AudioVAE, AUDIO_VAE_PRESETS, measure_sound_latents)


def _release_autoencoder(
    run: Path, folder: Path, network: type[nn.Module], presets: Mapping[str, Any],
    measure: Callable[[Any], tuple[list[float], list[float]]],
) -> None:
    """Averaged weights; the config carries the latents' statistics, which an encoder settles."""
    settings = _run_settings(run)
    config = presets[settings["preset"]]
    if settings.get("init"):
        config = config_of(type(config), Path(settings["init"]))
    if settings.get("encoder_dim"):
        config = replace(config, encoder_dim=settings["encoder_dim"])
    vae = network(config)
    vae.load_state_dict(load_averages(run, "vae"))
    if _moves_latents(settings):
        mean, std = measure(vae)
        config = replace(config, latents_mean=tuple(mean), latents_std=tuple(std))
    save_module(vae.state_dict(), config, folder, torch.bfloat16)


def _moves_latents(settings: Mapping[str, Any]) -> bool:
    """Whether a VAE's run left nothing that keeps latents where they were."""
    return settings["part"] == "all" and not settings["loss"].get("keep")


@torch.no_grad()
def measure_latents(vae: CausalVAE) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel over fresh clips of the world."""
    parts, fast = [], best_dtype(torch.device("cpu")) == "bf16"
    for start in range(0, NUM_STATISTICS_CLIPS, 8):
        scenes = sample_scenes(SEED_RANGES["train"][0] + 10**11 + start, 8, split="any")
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            mean, _ = vae.encode_moments(render(scenes, num_frames=33).video)
        parts.append(mean.float().transpose(0, 1).flatten(1))
    values = torch.cat(parts, dim=1)
    return _rounded(values.mean(1)), _rounded(values.std(1))


@torch.no_grad()
def measure_sound_latents(vae: AudioVAE) -> tuple[list[float], list[float]]:
    """Mean and deviation of each sound latent's channel over fresh clips of the world."""
    first = SEED_RANGES["train"][0] + 3 * 10**11
    clips = synthesize(sample_scenes(first, NUM_STATISTICS_CLIPS, split="any"))
    parts = [vae.encode_moments(part)[0] for part in clips.split(16)]
    values = torch.cat(parts).transpose(0, 1).flatten(1)
    return _rounded(values.mean(1)), _rounded(values.std(1))


def release_tokenizer(out: Path) -> None:
    """A BPE tokenizer of the world's captions, with the list of words the model is taught."""
    scenes = sample_scenes(SEED_RANGES["train"][0] + 2 * 10**11, NUM_CAPTIONS, split="train")
    captions = (caption(scene, seed) for seed, scene in enumerate(scenes))
    vocab_size = TEXT_PRESETS["toybox"].vocab_size
    train_tokenizer(captions, out / "tokenizer", vocab_size)


def release_dit(run: Path, out: Path, mix: Mapping[Path, float], *, keep_students: bool) -> None:
    """The transformer, the text encoder and the words of a run, or its expert at low noise.

    Args:
        run: its folder.
        out: the model's.
        mix: releases and the shares that their weights have in the average; the rest is the run's.
        keep_students: whether those of the old weights stay.
    """
    settings = _run_settings(run)
    dit = DIT_PRESETS[settings["preset"]]
    if _is_low(settings):
        made = mixed(load_averages(run, "transformer"), LOW, mix, out)
        student = open_few_step(out)
        if student is not None and student.boundary is not None and not keep_students:
            shutil.rmtree(out / FEW_STEP)
        save_module(made, dit, out / LOW, torch.bfloat16, INT8_FROM)
        return
    text = encoder_to_transformers(TEXT_PRESETS[settings["text_preset"]])
    made, words = (mixed(load_averages(run, part), part, mix, out)
                   for part in ("transformer", "text_encoder"))
    if not keep_students and settings["part"] != "sound":  # which leaves pictures as they were
        shutil.rmtree(out / FEW_STEP, ignore_errors=True)
    if settings["part"] == "all":  # the expert at low noise reads another text
        shutil.rmtree(out / LOW, ignore_errors=True)
    save_module(made, dit, out / "transformer", torch.bfloat16, INT8_FROM)
    save_module(words, text, out / "text_encoder", torch.bfloat16, SMALL_INT8_FROM)
    if settings.get("loose_share"):
        add_words(out / "tokenizer" / "words.txt", loose_vocabulary())
        write_synonyms(out / "tokenizer" / "synonyms.json")


def _is_low(settings: Mapping[str, Any]) -> bool:
    """Whether a run taught the expert at low noise."""
    return bool(settings.get("levels", (0, 1))[1] < 1)


def mixed(
    state: dict[str, torch.Tensor], part: str, mix: Mapping[Path, float], out: Path
) -> dict[str, torch.Tensor]:
    """Weights averaged with those of the same part of other folders, by these folders' shares.

    Parts for sound are averaged among the releases that make sound of the same latents as `out`:
    others' were never trained, or on other ones.

    Raises:
        ModelError: a folder has no such part, or one of other shapes.
    """
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in state.items()}
    shares = dict.fromkeys(state, 0.0)
    releases = [(state, 1 - sum(mix.values()), True)]
    for folder, share in mix.items():
        weights = _weights_like(state, folder / part)
        releases.append((weights, share, _makes_same_sound(folder, out)))
    for weights, share, same_sound in releases:
        for name, value in weights.items():
            if same_sound or "audio" not in name:
                total[name] += share * value.float()
                shares[name] += share
    return {name: value / shares[name] for name, value in total.items()}


def _makes_same_sound(folder: Path, out: Path) -> bool:
    if SOUND_TASK not in open_model(str(folder)).tasks or not (out / SOUND_VAE).exists():
        return False
    theirs, ours = (encoder_hash(path / SOUND_VAE, AudioVAEConfig) for path in (folder, out))
    return theirs == ours


def _weights_like(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a component's folder, which have to be of the same shapes."""
    path = folder / "model.safetensors"
    stored = open_tensors([path] if path.is_file() else [])
    weights = {name: lazy.get() for name, lazy in stored.items()}
    shapes, wanted = ({name: value.shape for name, value in each.items()}
                      for each in (weights, state))
    if shapes != wanted:
        raise ModelError(f"{path} isn't there, or holds other weights than the run; give --mix "
                         "releases of the same architecture")
    return weights


def add_words(path: Path, words: Iterable[str]) -> None:
    """Add words to the list of those that the model was taught."""
    known = set(path.read_text("utf-8").split()) if path.exists() else set[str]()
    known.update(*map(split_words, words))
    atomic_write(path, "".join(f"{word}\n" for word in sorted(known)).encode())


def write_synonyms(path: Path) -> None:
    """Write which of the words that loose captions add are to be read as the grammar's own."""
    rows = (f" {json.dumps(known)}: {json.dumps(words)}"
            for known, words in grammar_synonyms().items())  # fmt: skip
    atomic_write(path, ("{\n" + ",\n".join(rows) + "\n}\n").encode())


def release_student(run: Path, out: Path) -> None:
    """The delta of a run that taught a student, or its part for the expert at low noise.

    Raises:
        ModelError: the model it was taught on is another one than `out`'s.
    """
    settings = _run_settings(run)
    delta = build(DeltaConfig, settings["delta"], str(run))
    part, teacher = delta.part, open_trainable(settings["teacher"])
    weights = f"{part}/model.safetensors"
    taught, given = (sha256_file(folder / weights) for folder in (teacher.path, out))
    if taught != given:
        raise ModelError(f"{run} taught a student of {settings['teacher']}, whose {part} is not "
                         f"that of {out}; name the model it was taught on")
    trajectories = build(TrajectoryConfig, settings["trajectories"], str(run))
    factors = {name: value.bfloat16() for name, value in load_averages(run, "student").items()}
    student = FewStepConfig(
        trajectories.sampler, tuple(trajectories.sigmas.tolist()), trajectories.guidance_scale,
        teacher.defaults.boundary if delta.has_other else None,
    )
    write_few_step(adapter_of(factors), student, out, part)


def release_verifier(run: Path, out: Path) -> None:
    """The verifier of a run."""
    known = build(VerifierConfig, _run_settings(run)["model"], str(run))
    known = replace(known, labels=LABELS, tints=COLOURS)
    weights = load_averages(run, VERIFIER)
    save_module(weights, known, out / VERIFIER, torch.bfloat16, INT8_FROM)


def release_onset_detector(run: Path, out: Path) -> None:
    """The onset detector of a run."""
    config = build(OnsetDetectorConfig, _run_settings(run)["model"], str(run))
    weights = load_averages(run, ONSET_DETECTOR)
    save_module(weights, config, out / ONSET_DETECTOR, torch.bfloat16, SMALL_INT8_FROM)


def read_mix(entries: Sequence[str]) -> dict[Path, float]:
    """Folders and shares of FOLDER=SHARE.

    Raises:
        InputError: not a share, or more than all together.
    """
    mix = {}
    for entry in entries:
        folder, equals, share = entry.rpartition("=")
        try:
            mix[Path(folder)] = float(share if equals else "")
        except ValueError:
            raise InputError(f"--mix {entry}: give FOLDER=SHARE, such as old/toybox=0.4") from None
    if not all(share > 0 for share in mix.values()) or not sum(mix.values()) < 1:
        raise InputError(f"--mix {' '.join(entries)}: give shares over 0, less than 1 together")
    return mix


def tasks_of(out: Path, part: str, run: Path | None) -> tuple[str, ...]:
    """What clips of a folder can be made from, and along with.

    Args:
        out: the folder.
        part: that was just released: a transformer's run says what it was taught; after any other
            the folder does, but for the sound, which nothing makes in other latents.
        run: that it came from.
    """
    settings = {} if run is None else _run_settings(run)
    if part == "dit" and not _is_low(settings):
        anchored, sounds = settings.get("anchor_share", 0) > 0, bool(settings.get("sound"))
    else:
        before = _described(out).get("tasks", ())
        anchored, sounds = ANCHOR_TASK in before, SOUND_TASK in before
        sounds = sounds and (part != "sound" or settings.get("part") == "decoder")
    sounds = sounds and (out / SOUND_VAE).exists()
    return (*TASKS, *[ANCHOR_TASK] * anchored, *[SOUND_TASK] * sounds)


def history_noise_of(out: Path, part: str, run: Path | None) -> float:
    """What later windows see of those before; arguments as in `tasks_of`."""
    settings = {} if run is None else _run_settings(run)
    if part == "dit" and not _is_low(settings):
        return HISTORY_NOISE if settings.get("history_noise") else 0.0
    return float(_described(out).get("defaults", {}).get("history_noise", 0.0))


def boundary_of(out: Path, part: str, run: Path | None) -> float | None:
    """The noise level below which an expert of its own denoises; arguments as in `tasks_of`."""
    settings = {} if run is None else _run_settings(run)
    if part == "dit" and _is_low(settings):
        return float(settings.get("boundary") or settings["levels"][1])
    before: float | None = _described(out).get("defaults", {}).get("boundary")
    return before if (out / LOW).is_dir() else None


def oversampling_of(out: Path, part: str, run: Path | None) -> int:
    """Latent frames that the expert draws for one, as it was taught; arguments as in `tasks_of`."""
    settings = {} if run is None else _run_settings(run)
    if part == "dit" and _is_low(settings):
        finest = max(cache.get("fps", CacheConfig.fps) for cache in settings["caches"])
        return int(finest // settings.get("fps", DiTData.fps))
    settings = _described(out).get("defaults", {}).get("settings", {})
    before = int(settings.get("temporal_upsampling", 1))
    return before if (out / LOW).is_dir() else 1


def _described(out: Path) -> dict[str, Any]:
    """The folder's `model.json` so far; empty before the first."""
    info = out / "model.json"
    return dict(json.loads(info.read_text())) if info.exists() else {}


def _run_settings(run: Path) -> dict[str, Any]:
    if latest_checkpoint(run) is None:
        raise ModelError(f"{run} has no checkpoint; train there first")
    return dict(json.loads((run / "task.json").read_text()))


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 5) for value in values]


def main() -> int:
    """Release one part, then describe the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("vae", "tokenizer", "dit", "sound", "student", VERIFIER,
                                         ONSET_DETECTOR))
    parser.add_argument("--run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="model folder")
    parser.add_argument("--mix", action="append", default=[], metavar="FOLDER=SHARE",
                        help="dit: average with an earlier release")
    parser.add_argument("--keep-students", action="store_true",
                        help="dit: leave the students of the old weights there")
    options = parser.parse_args()
    if options.part != "tokenizer" and options.run is None:
        parser.error(f"{options.part} needs --run")
    for name, given in (("--mix", options.mix), ("--keep-students", options.keep_students)):
        if given and options.part != "dit":
            parser.error(f"{name} goes with dit, not with {options.part}; leave it out")

    def work() -> None:
        if options.part == "vae":
            release_vae(options.run, options.out)
        elif options.part == "dit":
            release_dit(options.run, options.out, read_mix(options.mix),
                        keep_students=options.keep_students)
        elif options.part == "sound":
            release_sound(options.run, options.out)
        elif options.part == "student":
            release_student(options.run, options.out)
        elif options.part == VERIFIER:
            release_verifier(options.run, options.out)
        elif options.part == ONSET_DETECTOR:
            release_onset_detector(options.run, options.out)
        else:
            release_tokenizer(options.out)
        if all((options.out / part).exists() for part in PARTS):
            told = options.out, options.part, options.run
            finer = oversampling_of(*told)
            own = {**DEFAULTS.settings, **({"temporal_upsampling": finer} if finer > 1 else {})}
            own |= VERIFIED if (options.out / VERIFIER).is_dir() else {}
            own |= LOOKING if (options.out / ONSET_DETECTOR).is_dir() else {}
            write_model_info(
                options.out, name=options.out.name, family="toybox", license_name="Apache-2.0",
                tasks=tasks_of(*told),
                defaults=replace(DEFAULTS, history_noise=history_noise_of(*told),
                                 boundary=boundary_of(*told), settings=own),
            )

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
