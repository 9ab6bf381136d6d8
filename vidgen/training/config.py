"""Settings of training, data and fine-tuning, read strictly from YAML and saved with every result.

`vidgen train` reads a `FinetuneConfig`, `vidgen data` its key `data`.
"""

from __future__ import annotations

import codecs
import encodings.aliases
import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vidgen.core.config import ONE, flattened
from vidgen.core.errors import InputError, nearest
from vidgen.core.runtime import best_dtype, choose_device
from vidgen.core.shapes import check_num_frames, check_size, size_for_aspect
from vidgen.core.values import check_number, parse_size

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

MAX_RATE = 100
"""Limit of learning rates, their factors and weight decay, far above any usable value."""
MAX_SEED = 2**32 - 1
MAX_RANK = 1024
"""Limit of a LoRA's rank, above which full training takes fewer parameters."""
Flaw = Literal["cut", "black", "white", "blank", "frozen"]
NO_CACHE = "none"
MAX_ASPECT = 10
_FREE = ("run.folder", "run.minutes", "run.log_every", "run.validate_every", "run.best",
         "run.checkpoint_minutes", "run.keep", "run.on_bad", "run.device", "run.engine",
         "run.steps", "validation.", "output.", "tensorboard")
"""Prefixes of keys that may change when a run resumes, as they don't affect its weights."""


@dataclass(frozen=True)
class OptimConfig:
    """Hold the settings of the optimiser and its learning-rate schedule.

    The rate is constant after a linear warm-up, and decays to zero as 1 - sqrt(progress) from the
    step `decay_from` on (Hagele et al. 2024, sec. 3).
    """

    lr: float = 5e-4  # peak rate of AdamW; Muon uses `muon_lr` (its update has AdamW's RMS)
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    # step at which the decay starts; None keeps the rate constant
    decay_from: int | None = None
    decay_steps: int = 0  # length of the decay
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "weight_decay"):
            check_number(f"optim.{name}", getattr(self, name), 0, MAX_RATE)
        for name in ("warmup_steps", "decay_from", "decay_steps"):
            check_number(f"optim.{name}", getattr(self, name))
        check_number("optim.grad_clip", self.grad_clip, infinite=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas is {list(self.betas)}; give two numbers in [0, 1)")
        if (self.decay_from is None) != (self.decay_steps == 0):
            raise InputError(
                f"optim.decay_from is {self.decay_from} and optim.decay_steps {self.decay_steps}; "
                "give both, the step at which the decay begins and its length, or neither")

    def scale_at(self, step: int) -> float:
        """Return the factor of the peak rates at `step`, from 0 to 1."""
        scale = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_from is not None and step >= self.decay_from:
            progress = (step - self.decay_from + 1) / max(1, self.decay_steps)
            scale *= max(0.0, 1.0 - min(1.0, progress) ** 0.5)
        return scale


@dataclass(frozen=True)
class EngineConfig:
    """Hold settings for several ranks, or for little memory on one."""

    # a DeepSpeed JSON with ZeRO's stage, offload and buckets: a path, or a name below
    # `train/deepspeed`; None: plain torch
    deepspeed: str | None = None
    # ranks that share each sample's tokens (DeepSpeed-Ulysses); divides the number of ranks
    sequence: int = 1

    def __post_init__(self) -> None:
        check_number("engine.sequence", self.sequence, 1, whole=True)


@dataclass(frozen=True)
class RunConfig:
    """Hold the settings of a run that apply to every task: folder, length, rates, engine."""

    folder: str  # run folder: checkpoints, `curve.jsonl`, sheets, the resolved config, `pid`
    steps: int = 1000  # optimiser steps
    batch_size: int = 1  # samples per micro-batch and rank
    accumulate: int = 1  # micro-batches per step and rank
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    device: str = "auto"
    # of the computation; weights are float32. `auto` is bf16 where the device supports it; it is
    # replaced by the chosen dtype, so that the run's record names that.
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    ema_decay: float = 0.999
    # wall-clock limit of one process, after which it writes a checkpoint and ends
    minutes: float | None = None
    log_every: int = 20
    validate_every: int = 500
    checkpoint_minutes: float = 4.0
    keep: int = 2  # number of newest checkpoints that are kept
    # a validation score; the checkpoint with the lowest one is also kept, and exported
    best: str | None = None
    # a loss above this multiple of its running mean is unusable, as NaN is; .inf: no such limit
    spike_factor: float = 20.0
    on_bad: Literal["skip", "stop"] = "skip"  # the effect of an unusable step
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "keep", "log_every", "validate_every"):
            check_number(f"run.{name}", getattr(self, name), 1, whole=True)
        check_number("seed", self.seed, 0, MAX_SEED)
        check_number("checkpoint_minutes", self.checkpoint_minutes, infinite=True)
        check_number("minutes", self.minutes, above=True, infinite=True)
        check_number("spike_factor", self.spike_factor, 1, above=True, infinite=True)
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}; give a number in [0, 1)")
        if self.dtype == "auto":
            is_gpu = self.device.startswith("cuda")  # may not be here, if the run is only planned
            best = "bf16" if is_gpu else best_dtype(choose_device(self.device))
            object.__setattr__(self, "dtype", best)

    def micro_batches(self, _step: int) -> tuple[int, int]:
        """Return the number of micro-batches per rank at a step, and of samples in each."""
        return self.accumulate, self.batch_size

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak rates at `step`."""
        return self.optim.scale_at(step)


@dataclass(frozen=True)
class FolderConfig:
    """Hold a folder of videos and pictures with captions; a text alone is its path."""

    SHORT: ClassVar[str] = "path"

    path: str  # searched with all its subfolders
    repeats: int = 1  # times that its items occur in an epoch

    def __post_init__(self) -> None:
        check_number("repeats", self.repeats, 1, whole=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Hold the sources of clips and pictures, and the shapes to which they are cut."""

    # folders of videos and pictures; a single one needs no list
    folders: tuple[FolderConfig, ...] = field(metadata=ONE)
    cache: str = NO_CACHE  # folder of `vidgen data cache`, or "none": encode in training
    # sizes of buckets, such as 832x480; none: `area` in `aspects`, else the model's own sizes
    sizes: tuple[str, ...] = field(default=(), metadata=ONE)
    # pixels of a frame, in each of the `aspects`, rounded to whole tokens
    area: int | None = None
    aspects: tuple[str, ...] = ("16:9", "4:3", "1:1", "3:4", "9:16")  # ratios such as 16:9
    # lengths of clips, of which each stretch takes the longest that fits; none: the model's own
    frames: tuple[int, ...] = field(default=(), metadata=ONE)
    fps: Fraction | None = None  # frame rate of training clips; None: the model's own
    max_crop: float = 0.35  # share of a frame that may be cropped; more drops the file
    max_enlarge: float = 1.25  # factor by which a frame may be enlarged; more drops the file
    # most items of one file, evenly spread; or "all", one after another
    windows: int | Literal["all"] = 1
    # flaws that no item may have; a file is cut into stretches without them
    avoid: tuple[Flaw, ...] = ("cut", "black", "white", "blank", "frozen")
    # "drop-exact" keeps one of files with the same bytes, "drop" also one of similar files
    duplicates: Literal["keep", "drop-exact", "drop"] = "drop-exact"
    # encoding of caption files; "auto" is UTF-8, or UTF-16 with its byte order mark
    caption_encoding: str = "auto"
    prefix: str = ""  # added before each caption, such as a new word for a subject
    # for files without a caption: "drop" leaves them out, "empty" trains with an empty prompt
    no_caption: Literal["drop", "empty"] = "drop"
    caption_dropout: float = 0.1  # share of items trained with an empty prompt, for guidance
    # share of steps with pictures; None: in proportion to their number
    image_share: float | None = None
    held_out: float = 0.0  # share of files held out for validation, chosen by content
    validation: str | None = None  # a folder with files for validation, instead
    store_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of cached latents and contexts
    seed: int = 0  # of order, captions and dropout

    def __post_init__(self) -> None:
        if not self.folders:
            raise InputError("data.folders is empty; give a folder of videos and pictures")
        for name in ("max_crop", "caption_dropout", "held_out", "image_share"):
            check_number(f"data.{name}", getattr(self, name), 0, 1)
        check_number("data.max_enlarge", self.max_enlarge, 1)
        if self.windows != "all":
            check_number("data.windows", self.windows, 1, whole=True)
        check_number("data.fps", self.fps, 0, 240, above=True)
        if self.sizes and self.area is not None:
            raise InputError("data.sizes and data.area both set the size of frames; give one")
        if self.held_out and self.validation is not None:
            raise InputError("data.held_out and data.validation both set validation data; give one")
        try:
            codecs.lookup("utf-8" if self.caption_encoding == "auto" else self.caption_encoding)
        except LookupError:
            known = {"auto", *encodings.aliases.aliases}
            raise InputError(f"data.caption_encoding is {self.caption_encoding!r}, which is "
                             f"unknown; {nearest(self.caption_encoding, known)}") from None


@dataclass(frozen=True, order=True)
class Bucket:
    """Hold one shape of items; all items of a batch have one bucket."""

    width: int
    height: int
    num_frames: int

    @property
    def label(self) -> str:
        """Text such as 832x480x81, or 832x480 for pictures."""
        length = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.width}x{self.height}{length}"


@dataclass(frozen=True)
class Geometry:
    """Hold the shapes of items for a config and a model."""

    sizes: tuple[tuple[int, int], ...]  # (width, height) of buckets
    frames: tuple[int, ...]  # lengths of clips, rising
    fps: Fraction  # of the items
    multiple: int  # pixels per side of a token
    stride_t: int  # frames per latent frame

    @classmethod
    def of(cls, config: DataConfig, folder: ModelFolder) -> Geometry:
        """Return the shapes that a config sets; InputError for one that the model lacks."""
        strides = folder.components["vae"].config.strides
        multiple = strides.hw * folder.components["transformer"].config.patch_size
        own = folder.defaults
        sizes = [parse_size(text) for text in config.sizes]
        if config.area is not None:
            aspects = [_aspect(text) for text in config.aspects]
            sizes = [size_for_aspect(a, config.area, multiple)[::-1] for a in aspects]
        sizes = sizes or list(own.sizes or ((own.width, own.height),))
        for width, height in sizes:
            check_size("width", width, multiple)
            check_size("height", height, multiple)
        frames = sorted(set(config.frames or (own.num_frames,)))
        for count in frames:
            check_num_frames(count, strides)
        fps = config.fps or Fraction(own.fps).limit_denominator(1001)
        return cls(tuple(dict.fromkeys(sizes)), tuple(frames), fps, multiple, strides.t)

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of the bucket with the aspect ratio nearest to a frame's."""
        def difference(size: tuple[int, int]) -> float:
            ratio = size[0] * height / (size[1] * width)
            return max(ratio, 1 / ratio)

        return min(self.sizes, key=difference)


def _aspect(text: str) -> float:
    first, colon, second = text.partition(":")
    try:
        ratio = float(first) / float(second if colon else "1")
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        raise InputError(f"data.aspects has {text!r}; give ratios of width to height such as "
                         f"16:9, at most {MAX_ASPECT}:1")
    return ratio


@dataclass(frozen=True)
class LoraSettings:
    """Hold the layers that get a low-rank delta, and its size (Hu et al. 2021)."""

    rank: int = 16  # columns of the two factors
    alpha: float | None = None  # scale times rank; None: the rank, for a scale of 1
    dropout: float = 0.0  # of the first factor's input
    # "attention": the projections of self- and cross-attention; "all": all linear layers of blocks;
    # or parts of layers' names, such as "self_attn.q" or "ffn". Audio layers are never included.
    targets: Literal["attention", "all"] | tuple[str, ...] = field(
        default="attention", metadata=ONE)

    def __post_init__(self) -> None:
        check_number("lora.rank", self.rank, 1, MAX_RANK, whole=True)
        check_number("lora.alpha", self.alpha, above=True)
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; give a number in [0, 1)")
        if self.targets in (("attention",), ("all",)):
            object.__setattr__(self, "targets", self.targets[0])
        if not self.targets:
            raise InputError("lora.targets is empty; give attention, all, or parts of names")


@dataclass(frozen=True)
class NoiseSettings:
    """Hold the density from which the sigma of each sample is drawn."""

    # "logit-normal" (Esser et al. 2024, eq. 19) or "uniform"
    density: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = 0.0  # of the logit-normal density
    std: float = 1.0  # of the logit-normal density
    shift: float | None = None  # shift towards noise, for larger clips; None: the model's own

    def __post_init__(self) -> None:
        if not abs(self.mean) < float("inf"):
            raise InputError(f"noise.mean is {self.mean}; give a finite number")
        check_number("noise.std", self.std, above=True)
        check_number("noise.shift", self.shift, above=True)


@dataclass(frozen=True)
class SubjectSettings:
    """Hold a spare token that names a subject in captions and prompts, and its training."""

    token: str  # a spare token of the tokenizer, `<subject_0>` to `<subject_63>`
    like: str  # words for something similar, whose mean embedding is the start
    lr: float = 0.02  # peak rate of the embedding, whose entries are about 1
    # weight of the loss on clips whose caption lacks the token. Their target is the model's own
    # prediction without the LoRA, so that other prompts keep their results (prior preservation,
    # Ruiz et al. 2023, with the targets of Li & Hoiem 2016). Costs one forward pass per step;
    # 0: they are learned as any clip is.
    keep_others: float = 5.0

    def __post_init__(self) -> None:
        if not self.like.strip():
            raise InputError("subject.like is empty; name something similar, such as 'horse'")
        check_number("subject.lr", self.lr, 0, MAX_RATE)
        check_number("subject.keep_others", self.keep_others, 0, MAX_RATE)


@dataclass(frozen=True)
class ValidationSettings:
    """Hold the settings of scores and sheets, every `run.validate_every` steps."""

    # values in (0, 1) at which the velocity's error is measured on held-out clips
    sigmas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    clips: int = 16  # largest number of held-out clips
    # prompts of the sheets and of the final A/B sheet; none: held-out captions
    prompts: tuple[str, ...] = field(default=(), metadata=ONE)
    sheet_every: int = 0  # steps between sheets, a multiple of `run.validate_every`; 0: none
    seed: int = 0  # of the sheets' first clip; each further one adds 1
    steps: int | None = None  # sampling steps of the sheets' clips; None: the model's own
    size: str | None = None  # "WxH" of the sheets' clips; None: of the first bucket
    frames: int | None = None  # of the sheets' clips; None: of the longest bucket
    guidance: float | None = None  # of the sheets' clips; None: the model's own

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise InputError(
                f"validation.sigmas is {list(self.sigmas)}; give numbers between 0 and 1")
        check_number("validation.clips", self.clips, 1, whole=True)
        check_number("validation.sheet_every", self.sheet_every)


@dataclass(frozen=True)
class OutputSettings:
    """Hold the names and formats of a run's results, and statements for the model card."""

    name: str = "finetuned"  # of the files, and title of the card
    # of additional LoRA files: diffusers, wan (for ComfyUI)
    dialects: tuple[Literal["diffusers", "wan"], ...] = field(default=(), metadata=ONE)
    # of LoRA files; a full model keeps the dtype of its files
    dtype: Literal["bf16", "fp32"] = "bf16"
    author: str = ""  # name or contact
    license: str = ""  # of the results
    data_license: str = ""  # of the clips
    consent: str = ""  # of people seen or heard in the clips, as a sentence
    description: str = ""  # purpose of the results, as a sentence
    ab_clips: int = 4  # prompts of the A/B sheet; 0: no sheet

    def __post_init__(self) -> None:
        check_number("output.ab_clips", self.ab_clips)
        if (not self.name or self.name.startswith(".") or not self.name.isprintable()
                or any(sign in self.name for sign in '/\\:@"')):
            raise InputError(f"output.name is {self.name!r}; give a file name without / : @ "
                             "that doesn't begin with a dot")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Hold all settings of a fine-tuning run, one YAML file."""

    model: str  # name of an embedded model, folder of toybox or the Wan family, or hub id
    data: DataConfig  # clips and captions
    run: RunConfig  # steps, rates, folder
    method: Literal["lora", "full"] = "lora"  # "lora", or "full": all weights of the transformer
    lora: LoraSettings = field(default_factory=LoraSettings)  # of the method "lora"
    # which transformers of a model with two are trained, each on its own noise levels
    experts: Literal["both", "high", "low"] = "both"
    # relative frequencies of text, first, last, both, frames, prefix, mask; None: those that the
    # model supports, text most often
    conditions: dict[str, float] | None = None
    noise: NoiseSettings = field(default_factory=NoiseSettings)  # density of sigmas
    # a spare token to learn with the LoRA, for models whose tokenizer has some
    subject: SubjectSettings | None = None
    # recompute blocks in the backward pass, which saves activation memory
    checkpointing: bool = False
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    tensorboard: bool = False  # also write TensorBoard's event files into the run's folder

    def __post_init__(self) -> None:
        if self.method == "lora" and self.run.optim.muon_lr:
            raise InputError(
                "run.optim.muon_lr works with the method full only: Muon makes updates of whole "
                "matrices orthogonal, and a LoRA has thin factors; leave it out")
        if self.method == "full" and self.subject is not None:
            raise InputError("subject works with the method lora only, whose file holds the "
                             "embedding; leave it out")
        every = self.validation.sheet_every
        if every % self.run.validate_every:
            raise InputError(
                f"validation.sheet_every is {every}; give a multiple of run.validate_every, "
                f"{self.run.validate_every}")


def refuse_changes(path: Path, record: dict[str, Any]) -> None:
    """Raise InputError if a run would resume with another config than that in `task.json`."""
    try:
        began = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}, the config of the run so far, can't be read: {error}; restore "
                         "it, or confirm with --accept-changes") from None
    before, now = flattened(began), flattened(record)
    changed = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
               for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key) and not key.startswith(_FREE)]
    if changed:
        raise InputError(
            f"the run in {path.parent} began with another config: {'; '.join(changed[:8])}"
            f"{'; ...' if len(changed) > 8 else ''}; restore that one, choose another folder, or "
            "confirm with --accept-changes")
