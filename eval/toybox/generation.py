"""Many prompts at once: the pipeline's verbs on a batch.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, K sound latents,
T H W frames, pixel rows and columns, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise
from vidgen.core.request import Request
from vidgen.diffusion import condition
from vidgen.diffusion.flow import draw_noise
from vidgen.diffusion.samplers import sample
from vidgen.diffusion.state import LatentState, new_state
from vidgen.models.tokenizer import normalise_words
from vidgen.pipeline.best_of_n import sample_best
from vidgen.pipeline.denoise import RegionalPrompts, upsampling_of
from vidgen.pipeline.engine import Engine
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.settings import SOUND, own_value
from vidgen.pipeline.sound.own_sound import own_sound, sound_plan
from vidgen.pipeline.tail import no_beginning
from vidgen.pipeline.types import Contexts, Plan


@torch.no_grad()
def generate_batch(
    engine: Engine,
    plan: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    first_frames: Tensor | None = None,
) -> Tensor:
    """Make a clip of each prompt; the same as one by one, but for rounding.

    Args:
        engine: the model.
        plan: size, length, steps and guidance of all; its own prompt and seed are not used.
        prompts: B of them.
        seeds: one each.
        first_frames: [B, 3, 1, H, W] in [-1, 1], with which the clips are to begin, or None.

    Returns:
        Video [B, 3, T, H, W] in [-1, 1], float32, on the CPU.
    """
    state = fresh_state(engine, plan, seeds)
    if first_frames is not None:
        first = engine.encode_first(first_frames, plan.refine_steps, passes=plan.encode_passes)
        state = condition.prefix(state, first)
    read = read_prompts(engine, prompts)
    latents = sampled(engine, plan, state, read, text_contexts(engine, plan, read))
    return pixels(engine, latents, plan.temporal_upsampling)


def sampled(
    engine: Engine, plan: Plan, state: LatentState, read: Sequence[str], contexts: Contexts
) -> Tensor:
    """Latents [B, C, F, h, w] of the best candidate of each clip."""
    if plan.candidates == 1:
        told = engine.regional_prompts(plan, state, read)
        return engine.sample(plan, state, contexts, regional=told)
    made = list[Tensor]()
    for row, prompt in enumerate(read):
        told = engine.regional_prompts(plan, state, [prompt])
        own = [(text[row : row + 1], count[row : row + 1]) for text, count in contexts]

        def draw(
            state: LatentState, _candidate: int, _resume: object, own: Contexts = own,
            told: RegionalPrompts | None = told,
        ) -> Tensor:
            return engine.sample(plan, state, own, regional=told)

        begun = state.rows(slice(row, row + 1))
        made.append(sample_best(engine.loader, plan, begun, prompt, draw, Journal(None), 0, 1)[0])
    return torch.cat(made)


@torch.no_grad()
def generate_with_sound(
    engine: Engine, plan: Plan, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Make a clip of each prompt, and the sound that the model makes for it.

    Returns:
        Video as `generate_batch` gives it, and sound [B, N] in [-1, 1], float32, on the CPU, as
        long as its frames are shown, at the rate of the model's sound VAE.

    Raises:
        InputError: the model makes no sound.
    """
    if SOUND not in engine.folder.tasks:
        raise InputError(f"{engine.folder.name} makes no sound for its pictures; score it with "
                         "another --suite")
    read = read_prompts(engine, prompts)
    contexts = text_contexts(engine, plan, read)
    picture = sampled(engine, plan, fresh_state(engine, plan, seeds), read, contexts)
    sounds, denoised = [], sound_plan(plan, engine.folder.defaults)
    for row, seed in enumerate(seeds):
        texts = [(text[row : row + 1], count[row : row + 1]) for text, count in contexts]

        def sample(state: LatentState, _window: int, texts: Contexts = texts) -> Tensor:
            return engine.sample(denoised, state, texts)

        own = own_sound(engine.loader, replace(plan, seed=seed), Request(prompt=read[row]),
                        [(0, plan.latents.num_frames)], no_beginning(plan))
        own.follow(picture[row : row + 1], sample, Journal(None))
        sounds.append(torch.from_numpy(own.decode()[0][:, 0]))
    return pixels(engine, picture, plan.temporal_upsampling), torch.stack(sounds)


def sample_state(name: str, denoise: Denoise, state: LatentState, sigmas: Tensor) -> Tensor:
    """Clean latents of a state by one of our samplers; packed where it has sound."""
    return sample(name, denoise, state.begin(), sigmas, fresh=state.fresh, project=state.project)


@torch.no_grad()
def round_trip(engine: Engine, video: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] encoded and decoded by the model's VAE, clamped, on the CPU.

    As a clip is that is given to be edited: at the rate that the model draws at.
    """
    rate = upsampling_of(engine.folder)
    passes = int(own_value("encode_passes", engine.folder))
    latents = engine.encode_video(video, passes=passes, rate=rate)
    return pixels(engine, latents, rate)


def pixels(engine: Engine, latents: Tensor, rate: int = 1) -> Tensor:
    """Video [B, 3, T, H, W] of latents [B, C, F, h, w], clamped, float32, on the CPU."""
    parts = engine.decode_video(latents, rate=rate)
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts], dim=2)


@torch.no_grad()
def sound_round_trip(engine: Engine, sound: Tensor) -> Tensor:
    """Sound [B, N] at the sound VAE's rate encoded and decoded, clamped, on the CPU."""
    with engine.loader.use("sound_vae") as vae:
        decoded = vae.decode(vae.encode(sound.to(engine.device)), sound.shape[1])
    return decoded.float().clamp(-1, 1).cpu()


def fresh_state(engine: Engine, plan: Plan, seeds: Sequence[int]) -> LatentState:
    """What clips of a plan's size begin as, each with its own noise."""
    noise = draw_noise(seeds, replace(plan.latents, batch=len(seeds)))
    return new_state(noise.to(engine.device))


def read_prompts(engine: Engine, prompts: Sequence[str]) -> list[str]:
    """Prompts in words that the model knows, as people's are read."""
    return [normalise_words(prompt, engine.tokenizer.replacements(prompt)) for prompt in prompts]


def text_contexts(engine: Engine, plan: Plan, read: Sequence[str]) -> Contexts:
    """(context, lengths) of prompts as `read_prompts` gives them, and of the plan's negative."""
    negative = normalise_words(plan.negative, dict(plan.word_normalisation))
    fullest = sound_plan(plan, engine.folder.defaults) if SOUND in engine.folder.tasks else plan
    texts = [read] if fullest.guidance.is_off else [read, [negative] * len(read)]
    return [engine.encode_texts(part) for part in texts]
