"""The guided denoiser of a clip: noise levels, the transformer of each, and guidance around it.

Wrappers, from the inside out: the network under one prompt with its step cache, regional prompts of
the things that the prompt names, and guidance. A model has one transformer, or two experts (Wan
2.2) above and below a boundary noise level. With temporal upsampling the frame rate changes at that
level, too.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, n things with
prompts of their own, S text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.diffusion.flow import make_sigmas, to_timestep
from vidgen.diffusion.guidance import (
    BRANCHES,
    NEGATIVE,
    PROMPT,
    UNSHOWN,
    as_negative,
    guidance_share,
    guided,
    unshown,
)
from vidgen.diffusion.samplers import scheduler_sigmas, whole_timesteps
from vidgen.diffusion.state import LatentState, denoise_inputs
from vidgen.models.dit_types import AudioTokens, KVCache
from vidgen.models.lora import attached
from vidgen.ops.parallel import Ranks, Spread
from vidgen.pipeline.settings import own_value
from vidgen.pipeline.types import Loras
from vidgen.weights.folder import ModelFolder, hash_files
from vidgen.weights.lora import EXPERTS, Expert, parse_option, read_choices

if TYPE_CHECKING:
    from vidgen.core.protocols import Denoise, StepCache
    from vidgen.diffusion.cache import StepCaches
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.dit_types import DiTConfig
    from vidgen.models.verifier import VerifierConfig
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.types import Contexts, Plan
    from vidgen.weights.component import ExpertRole, Role

TransformerAt = Callable[[float], "SpacetimeDiT"]
"""Maps a noise level to its transformer."""
ALONE = "alone"
"""Branch name, in addition to `BRANCHES`, of the regional prompt of one thing."""


def sigmas_of(plan: Plan, scheduler: Any = None) -> Tensor:
    """Return the noise levels [num_steps + 1] of a plan, or of its diffusers scheduler."""
    if scheduler is not None:
        return scheduler_sigmas(scheduler, plan.num_steps, strength=plan.strength)
    if plan.few_step is not None:
        return torch.tensor(plan.few_step.sigmas)
    lowest = 1e-3
    if plan.sampler == "euler":
        lowest = plan.shift * lowest / (1 + (plan.shift - 1) * lowest)
    return make_sigmas(plan.num_steps, plan.shift, strength=plan.strength, sigma_min=lowest,
                       reach_min=plan.sampler == "euler")


def sigma_split(plan: Plan, sigmas: Tensor, folder: ModelFolder) -> int:
    """Return the number of steps at or above the boundary, those at the clip's frame rate."""
    levels, boundary = sigmas.tolist()[:-1], boundary_of(folder, plan, has_audio=False)
    return len(levels) if boundary is None else sum(level >= boundary for level in levels)


def settles(plan: Plan, sigmas: Tensor, folder: ModelFolder) -> bool:
    """Return whether any step has the clip's frame rate; none has below the boundary."""
    return plan.temporal_upsampling == 1 or sigma_split(plan, sigmas, folder) > 0


def upsampling_of(folder: ModelFolder) -> int:
    """Return a model's factor of temporal upsampling, 1 if it has none."""
    return int(own_value("temporal_upsampling", folder))


def boundary_of(folder: ModelFolder, plan: Plan, *, has_audio: bool) -> float | None:
    """Return the noise level below which the low-noise expert denoises; None if it never does.

    A distilled model has a boundary of its own. With sound (`has_audio`) a low-noise expert without
    sound layers isn't used.
    """
    if "transformer_2" not in folder.components:
        return None
    if has_audio and folder.components["transformer_2"].config.audio is None:
        return None
    return folder.defaults.boundary if plan.few_step is None else plan.few_step.boundary


def read_loras(options: Sequence[str], folder: ModelFolder) -> Loras:
    """Read the adapters that `--lora` names.

    Raises:
        InputError: a file doesn't exist, or the model has no such expert.
        ModelError: a file isn't a LoRA of this model.
    """
    choices = [parse_option(option) for option in options]
    configs: dict[Role, DiTConfig] = {
        role: folder.components[role].config
        for role in ("transformer", "transformer_2") if role in folder.components}
    names: tuple[Expert | None, ...] = EXPERTS if len(configs) == 2 else (None,)
    adapters = {role: read_choices(choices, config, name)
                for (role, config), name in zip(configs.items(), names, strict=True)}
    records = [{"path": str(choice.path.resolve()), "weight": choice.weight,
                "expert": choice.expert, "sha256": hashes_of(choice.path)} for choice in choices]
    return Loras(adapters, records)


def hashes_of(path: Path) -> list[str]:
    """Return the sorted SHA-256 of a LoRA's files; raise InputError if the path doesn't exist."""
    if not path.exists():
        raise InputError(f"LoRA {path} does not exist; give a file or folder")
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sorted(hash_files(files).values())


@contextmanager
def experts(
    loader: ModelLoader, boundary: float | None, loras: Loras, start_sigma: float
) -> Iterator[TransformerAt]:
    """Yield the map from noise levels to transformers, with their adapters attached.

    Sampling starts at `start_sigma`; levels below `boundary` belong to the low-noise expert.
    Threads that share a model wait for each other.
    """
    now: tuple[ExpertRole, SpacetimeDiT] | None = None

    def role_at(sigma: float) -> ExpertRole:
        return "transformer_2" if boundary is not None and sigma < boundary else "transformer"

    def transformer_at(sigma: float) -> SpacetimeDiT:
        nonlocal now
        role = role_at(sigma)
        if now is None or now[0] != role:
            adapters.close()  # before this expert is freed for the other one
            now = role, loader.expert(role)
            adapters.enter_context(attached(now[1], loras.adapters.get(role, ())))
        return now[1]

    with loader.turn, loader.use(role_at(start_sigma)), ExitStack() as adapters:
        yield transformer_at


@contextmanager
def denoising(
    loader: ModelLoader, plan: Plan, state: LatentState, contexts: Contexts, loras: Loras,
    level: float, caches: StepCaches | None = None, regional: RegionalPrompts | None = None,
) -> Iterator[Denoise]:
    """Yield the guided model for sampling from sigma `level` on.

    Its transformer stays in memory inside the `with` block.
    """
    by_name = dict(zip(BRANCHES, contexts, strict=False))
    if plan.guidance.reference_scale:
        by_name[UNSHOWN] = contexts[0]
    others = regional.contexts if regional else []
    names, wanted = [*by_name, *[ALONE] * len(others)], [*by_name.values(), *others]
    with ExitStack() as stack:
        made = stack.enter_context(
            denoisers(loader, plan, state, wanted, loras, level, caches=caches, branches=names))
        by_branch, alone = dict(zip(by_name, made, strict=False)), made[len(by_name) :]
        conditional = by_branch[PROMPT]
        if regional is not None:
            conditional = stack.enter_context(regional.applied(loader, state, conditional, alone))
        if len(by_name) == 1:
            yield conditional
        else:
            yield guided(conditional, by_branch.get(NEGATIVE, conditional), plan.guidance,
                         denoise_mask=state.generated,
                         share=guidance_share(state, plan.guidance.reach),
                         denoise_unshown=by_branch.get(UNSHOWN))


@contextmanager
def denoisers(
    loader: ModelLoader, plan: Plan, state: LatentState, contexts: Contexts, loras: Loras,
    level: float, ranks: Ranks | None = None, caches: StepCaches | None = None, *,
    branches: Sequence[str] = BRANCHES,
) -> Iterator[list[Denoise]]:
    """Yield the model under each of the contexts, named by `branches`; arguments as in `denoising`.

    With `ranks` each call runs on all ranks together and returns the same result on each.
    """
    if plan.few_step is not None:
        loras = loras.plus(loader.deltas())
    if state.sound is not None:
        takes = state.sound.takes  # several sounds of a clip are adjacent in the batch
        contexts = [(features.repeat_interleave(takes, 0), lengths.repeat_interleave(takes, 0))
                    for features, lengths in contexts]
    hides_given = plan.guidance.known_scale is not None
    listens = state.is_known and state.sound is not None and ranks is None
    boundary = boundary_of(loader.folder, plan, has_audio=state.sound is not None)
    with experts(loader, boundary, loras, level) as transformer_at:
        made = []
        for branch, context in zip(branches, contexts, strict=False):
            seen = state
            if branch == NEGATIVE:
                seen = as_negative(state, hides_given=hides_given)
            elif branch == UNSHOWN:
                seen = unshown(state)
            if listens:
                made.append(_listener(loader, plan, seen, context, transformer_at))
                continue
            cache_at = partial(caches.at, branch) if caches and branch != ALONE else None
            made.append(_denoiser(loader, plan, seen, context, transformer_at, ranks, cache_at))
        yield made


def _denoiser(
    loader: ModelLoader, plan: Plan, state: LatentState, context: tuple[Tensor, Tensor],
    transformer_at: TransformerAt, ranks: Ranks | None,
    cache_at: Callable[[float, Spread | None], StepCache] | None,
) -> Denoise:
    patch = loader.folder.components["transformer"].config.patch_size

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        level, spread = float(sigma[0]), None
        if ranks is not None:
            picture, sound = state.unpack(latents)
            frames = picture.shape[2] + (0 if state.keys is None else state.keys.num_keys)
            tokens = frames * math.prod(side // patch for side in picture.shape[3:])
            spread = Spread(ranks, [tokens] if sound is None else [tokens, sound.shape[2]])
        return velocity(
            transformer_at(level), state, latents, sigma, context, patch=patch,
            frames_per_s=_frames_per_s(loader, plan), whole=whole_timesteps(plan.sampler),
            control_scale=plan.control_scale, ranks=ranks,
            step_cache=cache_at(level, spread) if cache_at else None,
        )

    return denoise


def _listener(
    loader: ModelLoader, plan: Plan, state: LatentState, context: tuple[Tensor, Tensor],
    transformer_at: TransformerAt,
) -> Denoise:
    """Return the model under one prompt for sounds of a known picture.

    The picture passes once and its keys and values are kept. Results equal `_denoiser`'s, except
    for the picture's velocity, which is zero: nothing uses it.
    """
    assert state.sound is not None
    (features, lengths), takes = context, state.sound.takes
    recorded: dict[nn.Module, KVCache] = {}

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        dit, (picture, sound) = transformer_at(float(sigma[0])), state.unpack(latents)
        assert sound is not None
        tokens = _audio_tokens(state, sound, sigma, _frames_per_s(loader, plan),
                               whole=whole_timesteps(plan.sampler))
        if tokens.sees_video and dit not in recorded:
            pictures, recorded[dit] = state.rows(slice(None, None, takes)), KVCache()
            dit(pictures.clean, torch.zeros_like(sigma[::takes]), features[::takes],
                context_lengths=lengths[::takes], extra=pictures.timed_keys,
                positions=pictures.times, cache=recorded[dit])
        made = dit.listen(tokens, features, context_lengths=lengths, cache=recorded.get(dit))
        return state.pack(torch.zeros_like(picture), made)

    return denoise


def _frames_per_s(loader: ModelLoader, plan: Plan) -> float:
    return float(plan.fps) / loader.folder.components["vae"].config.strides.t


def _audio_tokens(
    state: LatentState, sound: Tensor, sigma: Tensor, frames_per_s: float, *, whole: bool
) -> AudioTokens:
    assert state.sound is not None
    times = to_timestep(state.sound.levels(sigma), whole=whole)
    return AudioTokens(state.sound.impose(sound), times, frames_per_s, state.sound.start_s,
                       sees_video=state.sound.sees_picture, is_seen=not state.is_known)


def velocity(
    dit: Callable[..., Any], state: LatentState, latents: Tensor, sigma: Tensor,
    context: tuple[Tensor, Tensor], *, patch: int, frames_per_s: float | None = None,
    whole: bool = False, **options: Any,
) -> Tensor:
    """Return the velocity of a transformer under a state's conditions, in the samplers' layout.

    Args:
        latents: noisy latents, packed with the sound's if the state has sound.
        context: text features [B, S, D] and their lengths [B].
        patch: side of a token, in latents.
        frames_per_s: latent frames per second, which align sound; None without sound.
        whole: see `to_timestep`.
        options: further arguments of the transformer.
    """
    picture, sound = state.unpack(latents)
    seen, levels = denoise_inputs(state, sigma, picture, patch=patch)
    audio = None
    if sound is not None and frames_per_s is not None:
        audio = _audio_tokens(state, sound, sigma, frames_per_s, whole=whole)
    features, lengths = context
    made = dit(latents=seen, timestep=to_timestep(levels, whole=whole), context=features,
               context_lengths=lengths, image_context=state.image_context, extra=state.timed_keys,
               positions=state.times, audio=audio, control=state.control, **options)
    return made if isinstance(made, Tensor) else state.pack(*made)


@dataclass(frozen=True)
class RegionalPrompts:
    """Contexts of the things that clips' prompts name."""

    strength: float  # see `with_regions`
    labels: Tensor  # [B, n] on the CPU, `NO_LABEL` for a clip that names fewer than another
    # 2 n of (context [B, S, D], lengths [B]): each thing's actions, then each thing's looks; the
    # whole prompt's for `NO_LABEL`
    contexts: Sequence[tuple[Tensor, Tensor]]

    @contextmanager
    def applied(
        self, loader: ModelLoader, state: LatentState, denoise_all: Denoise,
        denoise_each: Sequence[Denoise],
    ) -> Iterator[Denoise]:
        """Yield the model with regional prompts; `denoise_each` are the models of `contexts`."""
        from vidgen.diffusion.regional_prompts import with_regions

        count = self.labels.shape[1]
        with loader.use("verifier") as verifier:
            known = verifier.config
            by_level = [_between(known.looks, looks, does) for does, looks in
                        zip(denoise_each[:count], denoise_each[count:], strict=True)]
            yield with_regions(denoise_all, by_level, verifier.where, state, self.labels,
                               self.strength, known.legible)


def _between(levels: tuple[float, float], inside: Denoise, outside: Denoise) -> Denoise:
    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        is_inside = levels[0] < float(sigma.max()) < levels[1]
        return (inside if is_inside else outside)(latents, sigma)

    return denoise


def regional_prompts(
    config: VerifierConfig, prompts: Sequence[str], strength: float,
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
) -> RegionalPrompts | None:
    """Return the regional prompts of clips; None if no prompt names more than one thing.

    `prompts` are normalised; `encode` maps texts to (context [B, S, D], lengths [B]).
    """
    from vidgen.diffusion.regional_prompts import NO_LABEL

    actions = [config.prompts_of_each(prompt) for prompt in prompts]
    most = max(map(len, actions))
    if most < 2:
        return None
    looks = [config.looks_of_each(prompt) for prompt in prompts]
    labels = [[*named, *[NO_LABEL] * (most - len(named))] for named in actions]
    contexts = [encode([own.get(label, prompt)
                        for own, label, prompt in zip(texts, each, prompts, strict=True)])
                for texts in (actions, looks) for each in zip(*labels, strict=True)]
    return RegionalPrompts(strength, torch.tensor(labels), contexts)


def can_be_regional(state: LatentState) -> bool:
    """Return whether the prompt alone defines the clips: no frame or key of them is known."""
    return not state.any_known and state.keys is None
