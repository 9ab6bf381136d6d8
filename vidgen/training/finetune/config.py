"""Settings of a fine-tuning run, read strictly from YAML and saved with its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vidgen.core.config import ONE
from vidgen.core.errors import InputError
from vidgen.core.values import check_number
from vidgen.training.config import MAX_RATE, RunConfig
from vidgen.training.data.config import DataConfig

MAX_RANK = 1024
"""Limit of a LoRA's rank, above which full training takes fewer parameters."""


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
