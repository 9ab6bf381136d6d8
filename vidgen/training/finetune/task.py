"""Fine-tuning as a task of the training loop: batches, conditions, noise, loss, validation.

A condition is drawn for each sample: text alone, first frame, first and last frame, a beginning to
extend; `ModelFolder.conditioning` says in which form it enters the transformer.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, S text
tokens, D width of text features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError, nearest
from vidgen.core.runtime import choose_device
from vidgen.core.shapes import Strides
from vidgen.diffusion import condition
from vidgen.diffusion.condition import KINDS, draw_conditions, with_given
from vidgen.diffusion.flow import add_noise, draw_sigmas, share_below, velocity_loss
from vidgen.diffusion.state import LatentState, new_state
from vidgen.models.text import encode_tokens
from vidgen.pipeline.denoise import velocity
from vidgen.pipeline.loader import EXPERTS
from vidgen.training.config import FinetuneConfig
from vidgen.training.data.dataset import Dataset
from vidgen.training.engines.distributed import current_place
from vidgen.training.finetune.model import open_subject, open_transformers, rate_of, without_delta
from vidgen.training.optim import build_optimizers
from vidgen.training.task import Task, drawn, generator_of
from vidgen.weights.folder import ModelFolder

Sheet = Callable[[int, Path, Mapping[str, nn.Module]], None]
"""A function that writes a sheet of clips: (step, folder, modules)."""

SHOWN_SHARE = 0.2
"""Share of an expert's steps without temporal upsampling, if it upsamples: some generated clips,
such as those with a mask, are never upsampled."""
_MEAN = "velocity_mean"
"""Name of the mean of the validation's scores."""
_DEFAULTS = {"text": 0.6, "first": 0.2, "last": 0.05, "both": 0.05, "frames": 0.05, "prefix": 0.1}
_TASK = {
    "first": "image", "last": "last-image", "both": "last-image", "frames": "frames",
    "prefix": "extend", "mask": "mask",
}
_IN_CHANNELS, _IN_CONTROL = ("first", "both"), ("text", "first", "both")


def possible_conditions(folder: ModelFolder) -> tuple[str, ...]:
    """Return the names of the conditions that a model can be trained with."""
    if folder.conditioning == "none":
        return ("text",)
    if folder.conditioning == "control":
        return _IN_CONTROL
    if folder.conditioning == "channels":
        if folder.components["transformer"].config.image_positions is not None:
            return ("both",)  # it learned positions of two pictures
        return _IN_CHANNELS if "last-image" in folder.tasks else _IN_CHANNELS[:1]
    return ("text", *(kind for kind, task in _TASK.items() if task in folder.tasks))


def settle_conditions(weights: Mapping[str, float] | None, folder: ModelFolder) -> dict[str, float]:
    """Return each condition's relative frequency, by default of all; InputError for wrong ones."""
    possible = possible_conditions(folder)
    if weights is None:
        return {kind: _DEFAULTS[kind] for kind in possible if kind in _DEFAULTS}
    known = set(KINDS)
    for kind, weight in weights.items():
        if kind not in known:
            raise InputError(f"conditions: unknown condition {kind!r}; {nearest(kind, known)}")
        if not 0 <= weight < float("inf"):
            raise InputError(f"conditions.{kind} is {weight}; give a number of at least 0")
        if weight and kind not in possible:
            raise InputError(
                f"conditions.{kind}: {folder.name} doesn't support this condition; it supports "
                f"{', '.join(possible)}")
    if not any(weights.values()):
        raise InputError("conditions: give at least one a weight above 0")
    return dict(weights)


@dataclass(frozen=True)
class Conditions:
    """The conditions of one model and their relative frequencies."""

    folder: ModelFolder
    weights: Mapping[str, float]  # relative frequency by condition

    def write(self, batch: Mapping[str, Any], draw: torch.Generator, rate: int = 1) -> LatentState:
        """Return the state of a dataset's batch, with its latents as `clean`, on the CPU.

        At a `rate` above 1 the latents are the batch's `finer` [B, C, n, h, w].
        """
        if rate > 1:
            batch = {**batch, "latents": batch["finer"]}
            if "still_index" in batch:
                batch["still_index"] = batch["still_index"] * rate
        latents, components = batch["latents"], self.folder.components
        strides: Strides = components["vae"].config.strides
        if self.folder.conditioning == "tokens":
            index, (clips, _, frames, *sides) = batch.get("still_index"), latents.shape
            given = draw_conditions((clips, frames, *sides), draw, self.weights, strides,
                                    frame_index=None if index is None else index.cpu(),
                                    patch=components["transformer"].config.patch_size)
            state = with_given(latents, given, batch.get("stills"), strides)
            return replace(state, spacing=1 / rate)
        names = [name for name, weight in self.weights.items() if weight]
        weights = torch.tensor([self.weights[name] for name in names])
        drawn = torch.multinomial(weights, len(latents), replacement=True, generator=draw)
        kinds = [names[i] for i in drawn.tolist()]
        state = replace(new_state(latents), clean=latents, spacing=1 / rate)
        if self.folder.conditioning == "channels":
            rows = []
            for i, kind in enumerate(kinds):
                known = _known(latents, kind, strides)
                rows.append(condition.known_frames(batch[kind][i : i + 1], known, strides))
            features: Tensor | None = batch.get("image")
            if features is not None and "image_last" in batch:
                features = torch.cat([features, batch["image_last"]], dim=1)
            return replace(state, stacked=torch.cat(rows), image_context=features)
        if self.folder.conditioning != "control" or "grey" not in batch:
            return state  # pictures have no condition
        grey, rows = batch["grey"], []
        size = [length * strides.hw for length in latents.shape[3:]]
        for i, kind in enumerate(kinds):
            is_known = kind != "text" and kind in batch
            known = _known(latents, kind if is_known else "text", strides)
            wanted = (~known).float()[None, None, :, None, None].expand(1, 1, -1, *size)
            kept = batch[kind][i : i + 1] if is_known else grey
            rows.append(condition.control_rows(kept, grey, wanted, strides))
        return replace(state, control=torch.cat(rows))


def _known(latents: Tensor, kind: str, strides: Strides) -> Tensor:
    """Return a mask [T] of the pixel frames that a condition gives."""
    known = torch.zeros(1 + (latents.shape[2] - 1) * strides.t, dtype=torch.bool)
    known[0] = kind in ("first", "both")
    known[-1] = known[-1] or kind == "both"
    return known


@dataclass(frozen=True)
class Batch:
    """Hold one micro-batch on the run's device."""

    state: LatentState  # clean latents and their conditions
    noise: Tensor  # [B, C, F, h, w]
    sigma: Tensor  # [B]
    role: str  # of the transformer to train on it
    # features [B, S, D], or token ids [B, S] if the step encodes captions
    text: Tensor
    lengths: Tensor  # [B], valid tokens of each text
    files: list[str]  # names


class FinetuneTask(Task):
    """Fine-tuning of a model's transformers on a dataset of its latents."""

    saves_frozen = False

    def __init__(self, config: FinetuneConfig, folder: ModelFolder, dataset: Dataset,
                 sheet: Sheet | None = None) -> None:
        self.config, self.folder, self.dataset, self.sheet = config, folder, dataset, sheet
        self.device = choose_device(config.run.device)
        if folder.conditioning == "channels" and any(b.num_frames == 1 for b in dataset.buckets):
            raise InputError(
                f"{folder.name} generates clips from a first frame, so it can't be trained on "
                "pictures; leave them out of data.folders")
        self.conditions = Conditions(folder, settle_conditions(config.conditions, folder))
        torch.manual_seed(config.run.seed)
        self.transformers = open_transformers(config, folder, self.device)
        self.subject = None
        if config.subject is not None:
            self.subject = open_subject(config.subject, folder, self.device)
        self.modules: dict[str, nn.Module] = dict(self.transformers)
        if self.subject is not None:
            self.modules["token"] = self.subject.token.to(self.device)
        self.alternates = len(self.transformers) > 1
        self._dit_config: Any = folder.components["transformer"].config
        has_two, noise = EXPERTS[1] in folder.components, config.noise
        self._boundary = folder.defaults.boundary or 0.0 if has_two else 0.0
        self._density: dict[str, Any] = {
            "shift": folder.defaults.shift if noise.shift is None else noise.shift,
            "mean": None if noise.density == "uniform" else noise.mean, "std": noise.std,
        }
        self._sigmas = self._settle_sigmas()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return AdamW, and Muon for the blocks' matrices if `muon_lr` is set."""
        optim = self.config.run.optim
        made = build_optimizers(self.transformers, optim,
                                use_muon=lambda name, _: ".blocks." in name)
        if self.config.subject is not None and self.subject is not None:
            rate = self.config.subject.lr
            made[0].add_param_group({"params": [self.subject.token.row], "lr": rate,
                                     "peak_lr": rate, "weight_decay": 0.0})
        return made

    def batch(self, step: int, micro: int) -> Batch:
        """Make a micro-batch: clips of the step's bucket, with conditions and noise."""
        size = current_place().data_size
        data = self.dataset.batch(step, micro // size, micro % size, size)
        draw = generator_of(self.config.run.seed, step, micro)
        role = self._role(step)
        limits = (self._boundary, 1.0) if role == EXPERTS[0] else (0.0, self._boundary)
        sigma = draw_sigmas(len(data["latents"]), draw, between=limits, **self._density)
        shown = drawn(self.config.run.seed, step, -2) < SHOWN_SHARE
        rate = 1 if shown else rate_of(self.folder, role)
        return self._assemble(data, draw, sigma, role, self.conditions, rate)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the velocity's mean squared error over generated latents, and `tokens`."""
        del step
        subject, shape = self.config.subject, batch.state.clean.shape
        tokens = shape[0] * shape[2:].numel() / self._dit_config.patch_size**2
        error = self._error(batch, 0.0 if subject is None else subject.keep_others)
        return error, {"tokens": torch.tensor(tokens)}

    def files(self, batch: Batch) -> list[str]:
        """Return the names of a batch's files."""
        return batch.files

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Return the velocity's error at fixed sigmas and noise; write a sheet if one is due."""
        settings, bf16 = self.config.validation, self.config.run.dtype == "bf16"
        scores = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            for sigma in self._sigmas:
                role = self._role_at(sigma)
                errors = [
                    (float(self._error(self._held_out(index, sigma, role))), len(data["files"]))
                    for index, data in enumerate(self._validation)
                ]
                total = sum(count for _, count in errors)
                scores[_score(sigma)] = sum(e * count for e, count in errors) / total
        scores[_MEAN] = sum(scores.values()) / len(scores)
        every = settings.sheet_every
        if self.sheet is not None and every and step % every == 0:
            self.sheet(step, folder, self.modules)
        return scores

    def _settle_sigmas(self) -> list[float]:
        """Return the sigmas of the validation at which the trained transformers denoise."""
        config, given = self.config, self.config.validation.sigmas
        sigmas = [sigma for sigma in given if self._role_at(sigma) in self.transformers]
        if not sigmas:
            side = "from" if config.experts == "high" else "below"
            raise InputError(
                f"validation.sigmas {list(given)} has none at which the {config.experts}-noise "
                f"expert denoises; give some {side} {self._boundary:g}")
        scores = [_MEAN, *map(_score, sigmas)]
        if config.run.best not in (None, *scores):
            raise InputError(f"run.best is {config.run.best!r}, which validation doesn't score; "
                             f"{nearest(str(config.run.best), scores)}")
        return sigmas

    @cached_property
    def _validation(self) -> list[dict[str, Any]]:
        source = self.dataset.held_out or self.dataset
        chosen: dict[Any, list[int]] = {}
        for index in range(min(self.config.validation.clips, len(source.items))):
            chosen.setdefault(source.items[index].bucket, []).append(index)
        size = self.config.run.batch_size
        return [source.item_batch(indices[start : start + size])
                for indices in chosen.values() for start in range(0, len(indices), size)]

    def _held_out(self, index: int, sigma: float, role: str) -> Batch:
        """Return a validation batch at a sigma, always with the same noise and condition."""
        data, draw = self._validation[index], generator_of(index, round(sigma * 1e6))
        kinds = self.conditions.weights
        kind = next(name for name in ("text", "first", "both", *kinds) if kinds.get(name))
        conditions = replace(self.conditions, weights={kind: 1.0})
        sigmas = torch.full((len(data["files"]),), sigma)
        return self._assemble(data, draw, sigmas, role, conditions, rate_of(self.folder, role))

    def _assemble(
        self, data: Mapping[str, Any], draw: torch.Generator, sigma: Tensor, role: str,
        conditions: Conditions, rate: int,
    ) -> Batch:
        rate = rate if "finer" in data else 1  # pictures have one rate
        state = conditions.write(data, draw, rate).to(self.device)
        noise = torch.randn(state.clean.shape, generator=draw).to(self.device)
        if self.subject is None:
            text, lengths = data["context"], data["context_lengths"]
        else:
            text, mask = self.subject.tokenizer.encode(data["captions"])
            lengths = mask.sum(1)
        return Batch(state, noise, sigma.to(self.device), role, text.to(self.device),
                     lengths.to(self.device), list(data["files"]))

    def _error(self, batch: Batch, keep: float = 0.0) -> Tensor:
        """Return the mean squared error, weighted by `keep` for clips without the subject."""
        state, noise, context = batch.state, batch.noise, batch.text
        noisy, dit = add_noise(state.clean, noise, batch.sigma), self.transformers[batch.role]
        if self.subject is not None:
            mask = torch.arange(batch.text.shape[1], device=self.device) < batch.lengths[:, None]
            # through the module in `modules`, as engines rely on its hooks
            learned = self.modules["token"]()
            context = encode_tokens(self.subject.encoder, batch.text, mask, learned)

        def predict() -> Tensor:
            return velocity(dit, state, noisy, batch.sigma, (context, batch.lengths),
                            patch=self._dit_config.patch_size, ranks=current_place().ranks)

        if self.subject is None or not keep:
            return velocity_loss(predict(), state.clean, noise, state.denoise_mask).mean()
        with torch.no_grad(), without_delta(dit):  # on all ranks, as they gather weights
            before = predict()
        others = ~(batch.text == self.subject.token.index).any(1)
        own = (state.clean + before).to(noise.dtype)
        noise = torch.where(others.view(-1, 1, 1, 1, 1), own, noise)
        errors = velocity_loss(predict(), state.clean, noise, state.denoise_mask)
        return (errors * torch.where(others, keep, 1.0)).mean()

    def _role(self, step: int) -> str:
        """Return a step's transformer: of two, each with the probability of its sigmas."""
        if not self.alternates:
            return next(iter(self.transformers))
        share = share_below(self._boundary, **self._density)
        return EXPERTS[1] if drawn(self.config.run.seed, step, -1) < share else EXPERTS[0]

    def _role_at(self, sigma: float) -> str:
        return EXPERTS[0] if sigma >= self._boundary else EXPERTS[1]


def _score(sigma: float) -> str:
    return f"velocity_{sigma:g}"
