"""Load a pipeline of diffusers, place it on a device, and call it with a request's settings."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from vidgen.core.errors import InputError, ModelError
from vidgen.media.types import Frames, Samples
from vidgen.pipeline.diffusers_backend.plan import SIBLINGS, Abilities, DiffusersPlan, check_sides
from vidgen.weights.component import quiet_torchao
from vidgen.weights.folder import DiffusersFolder

OnProgress = Callable[[int, int], None]
"""Called with the steps done and their total."""
Made = tuple[Frames, Samples | None, int]
"""Result of a pipeline: frames, sound float32 [N, channels], and its rate in Hz."""
_DAMAGES = (OSError, ValueError, AttributeError, ImportError, RuntimeError, SafetensorError)


class LoadedPipeline:
    """A folder's pipeline, and the pipelines of the same weights that take a picture or clip.

    `loader` loads the folder; None: `DiffusionPipeline`, which takes the class that it names.

    Raises:
        ModelError: the installed diffusers has no such class, or files are missing or damaged.
    """

    def __init__(
        self, folder: DiffusersFolder, device: torch.device, dtype: torch.dtype, offload: str,
        loader: Any = None,
    ) -> None:
        self.folder, self.device, self.offload = folder, device, offload
        self.own = _load(folder, dtype, loader)
        self._placed: Any = None
        vae: Any = getattr(self.own, "vae", None)
        if hasattr(vae, "use_framewise_decoding"):
            parameters = inspect.signature(vae.decoder.forward).parameters
            if "conv_cache" in parameters or "feat_cache" in parameters:  # carries the past over
                vae.use_framewise_decoding = True  # equal frames in less memory

    def taking(self, option: str | None) -> Any:
        """Return the pipeline that takes a picture or clip given as `option`, on its device."""
        import diffusers

        sibling = SIBLINGS.get((type(self.own).__name__, option or ""))
        pipe = self.own if sibling is None else getattr(diffusers, sibling)(**self.own.components)
        if pipe is not self._placed:
            self._place(pipe)
            self._placed = pipe
        return pipe

    def close(self) -> None:
        """Free the weights; the pipeline can't be used afterwards."""
        self.own = self._placed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _place(self, pipe: Any) -> None:
        if self.device.type != "cuda" or self.offload == "none":
            pipe.to(self.device)
            return
        try:
            if self.offload == "stage":
                pipe.enable_model_cpu_offload(device=self.device)
            else:
                pipe.enable_sequential_cpu_offload(device=self.device)
        except ImportError as error:
            raise ModelError(f"offload {self.offload!r} needs accelerate: {error}; "
                             "pip install accelerate") from error

    def make(
        self, able: Abilities, plan: DiffusersPlan, scheduler: Any, arguments: dict[str, Any],
        on_step: OnProgress,
    ) -> Made:
        """Call a pipeline with a request's scheduler, guidance and arguments.

        Raises:
            InputError: the pipeline refuses the arguments.
            ModelError: out of memory.
        """
        try:
            with _lent(able, plan, scheduler), stepping(able.pipe, on_step):
                output = able.pipe(**arguments)
        except ValueError as error:
            rule = re.search(r"divisible by (\d+)", str(error))
            if rule is not None:
                check_sides(plan.width, plan.height, int(rule[1]))
            raise InputError(f"{plan.pipeline} refuses this: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ModelError(f"{plan.pipeline} ran out of memory at {plan.width}x{plan.height}; "
                             "give --offload stage or block, or a smaller --size") from error
        except RuntimeError as error:
            if "latents" not in arguments:
                raise
            shape = list(arguments["latents"].shape)
            raise InputError(f"latents of {shape} don't suit {plan.pipeline}: {error}; give them "
                             "in the pipeline's own layout") from error
        shown = output[0] if able.is_image else output[0][0]
        frames = [(np.asarray(each, np.float32).clip(0, 1) * 255).round().astype(np.uint8)
                  for each in shown]
        return np.stack(frames), *_sound(able.pipe, output)


class _StepBar:
    """Progress bar of a pipeline that reports its steps to `on_step`."""

    def __init__(self, iterable: Any, total: int | None, on_step: OnProgress) -> None:
        self._iterable, self._on_step = iterable, on_step
        self._done, self._total = 0, len(iterable) if total is None else total

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        """Report a step; an exception from `on_step` stops the pipeline after it."""
        self._done = min(self._done + count, self._total)
        self._on_step(self._done, self._total)


@contextmanager
def stepping(pipe: Any, on_step: OnProgress) -> Iterator[None]:
    """Make a pipeline report its steps, and free the device if it stops early."""
    pipe.progress_bar = lambda iterable=None, total=None: _StepBar(iterable, total, on_step)
    try:
        yield
    except BaseException:
        pipe.maybe_free_model_hooks()
        raise
    finally:
        del pipe.progress_bar


@contextmanager
def _lent(able: Abilities, plan: DiffusersPlan, scheduler: Any) -> Iterator[None]:
    """Use a request's scheduler and guidance inside the block."""
    pipe, own_scheduler, own_guider = able.pipe, able.pipe.scheduler, able.guider
    pipe.scheduler = scheduler
    if own_guider is not None:
        pipe.guider = own_guider.new(guidance_scale=plan.guidance_scale)
    try:
        yield
    finally:
        pipe.scheduler = own_scheduler
        if own_guider is not None:
            pipe.guider = own_guider


def _load(folder: DiffusersFolder, dtype: torch.dtype, loader: Any) -> Any:
    import diffusers
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    version = diffusers.__version__
    if getattr(diffusers, folder.class_name, None) is None:
        raise ModelError(f"{folder.path} is a {folder.class_name}, which diffusers {version} "
                         "doesn't have; install a newer diffusers")
    try:
        with quiet_torchao(), _without_bars(diffusers_logging, transformers_logging):
            pipe = (loader or diffusers.DiffusionPipeline).from_pretrained(
                str(folder.path), dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except _DAMAGES as error:
        raise ModelError(f"{folder.path} can't be loaded as {folder.class_name} by diffusers "
                         f"{version}: {error}; copy it again, or install a newer "
                         "diffusers") from error
    if not {"prompt", "image", "video"} & Abilities(pipe).defaults.keys():
        raise ModelError(f"{folder.path} is a {folder.class_name}, which takes no prompt, picture "
                         "or clip; give a text-to-video, image-to-video or text-to-image model")
    return pipe


def _sound(pipe: Any, output: Any) -> tuple[Samples | None, int]:
    """Return the sound in the output, float32 [N, channels], and its rate."""
    waves = getattr(output, "audio", None)
    if waves is None:
        return None, 48_000
    config = getattr(getattr(pipe, "vocoder", None), "config", {})
    names = ("output_sampling_rate", "sampling_rate", "sample_rate")
    rate = int(next((config[name] for name in names if config.get(name)), 48_000))
    wave = torch.as_tensor(waves)[0].float().cpu().clamp(-1, 1)
    wave = wave[None] if wave.ndim == 1 else wave
    return wave.T.contiguous().numpy(), rate


@contextmanager
def _without_bars(*libraries: Any) -> Iterator[None]:
    """Hide loading bars of `utils.logging` modules, which would break into vidgen's progress."""
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
