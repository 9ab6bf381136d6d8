"""Settings of a fine-tuning run, read strictly from YAML and dumped with its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vidgen.core.config import ONE
from vidgen.core.errors import InputError
from vidgen.core.values import check_number
from vidgen.training.config import MAX_RATE, RunConfig
from vidgen.training.data.config import DataConfig

MAX_RANK = 1024
"""Of a LoRA: beyond it all weights are fewer."""


@dataclass(frozen=True)
class LoraSettings:
    """The layers that get a low-rank delta, and its size (Hu et al. 2021)."""

    rank: int = 16  # columns of the two factors
    alpha: float | None = None  # scale times rank; None: the rank, so that the scale is 1
    dropout: float = 0.0  # of what enters the first factor
    # "attention": the projections of self- and cross-attention; "all": all linear layers of blocks;
    # or parts of layers' names, such as "self_attn.q" or "ffn". Layers that make sound aren't among
    # them.
    targets: Literal["attention", "all"] | tuple[str, ...] = field(
        default="attention", metadata=ONE)

    def __post_init__(self) -> None:
        check_number("lora.rank", self.rank, 1, MAX_RANK, whole=True)
        check_number("lora.alpha", self.alpha, above=True)
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; it must lie in 0..1")
        if self.targets in (("attention",), ("all",)):
            object.__setattr__(self, "targets", self.targets[0])
        if not self.targets:
            raise InputError("lora.targets is empty; give attention, all, or parts of names")


@dataclass(frozen=True)
class NoiseSettings:
    """The density from which noise levels of samples are drawn."""

    # "logit-normal" (Esser et al. 2024, eq. 19) or "uniform".
    density: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: float = 0.0  # of the logit-normal density
    std: float = 1.0  # of the logit-normal density
    shift: float | None = None  # towards noise, as larger clips need; None: the model's own

    def __post_init__(self) -> None:
        if not abs(self.mean) < float("inf"):
            raise InputError(f"noise.mean is {self.mean}; it must be finite")
        check_number("noise.std", self.std, above=True)
        check_number("noise.shift", self.shift, above=True)


@dataclass(frozen=True)
class SubjectSettings:
    """A spare token that stands for a subject in captions and prompts."""

    token: str  # one of the tokenizer's, `<subject_0>` to `<subject_63>`
    like: str  # words that say what the subject is like: where its embedding starts
    lr: float = 0.02  # peak rate of the embedding, whose entries are about 1
    # clips whose caption lacks the token teach nothing new: on them the model's own answer without
    # the LoRA is learned, so that all else stays as it is (prior preservation, Ruiz et al. 2023,
    # with the targets of Li & Hoiem 2016), and errors count so many times. Costs a forward pass a
    # step; 0: they teach what they show.
    keep_others: float = 5.0

    def __post_init__(self) -> None:
        if not self.like.strip():
            raise InputError("subject.like is empty; say what the subject is like, such as 'horse'")
        check_number("subject.lr", self.lr, 0, MAX_RATE)
        check_number("subject.keep_others", self.keep_others, 0, MAX_RATE)


@dataclass(frozen=True)
class ValidationSettings:
    """Scores and sheets every `run.validate_every` steps, always with the same noise."""

    # noise levels at which the velocity's error is measured on held-out clips
    sigmas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    clips: int = 16  # at most so many of them
    # of the sheet's clips, and of the A/B sheet in the end; none: held-out captions
    prompts: tuple[str, ...] = field(default=(), metadata=ONE)
    sheet_every: int = 0  # steps between sheets, a multiple of `run.validate_every`; 0: none
    seed: int = 0  # of all of the sheets' clips
    steps: int | None = None  # sampling steps of the sheets' clips; None: the model's own
    size: str | None = None  # "WxH" of the sheets' clips; None: of the first bucket
    frames: int | None = None  # of the sheets' clips; None: of the longest bucket
    guidance: float | None = None  # of the sheets' clips; None: the model's own

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise InputError(f"validation.sigmas {list(self.sigmas)} must lie between 0 and 1")
        check_number("validation.clips", self.clips, 1, whole=True)
        check_number("validation.sheet_every", self.sheet_every)


@dataclass(frozen=True)
class OutputSettings:
    """The files that a run writes, and statements of its model card."""

    name: str = "finetuned"  # of the files and in the card
    # of further LoRA files: diffusers, wan (which ComfyUI reads)
    dialects: tuple[Literal["diffusers", "wan"], ...] = field(default=(), metadata=ONE)
    # of LoRA files; a whole model's weights stay in the dtype that its files had
    dtype: Literal["bf16", "fp32"] = "bf16"
    author: str = ""  # who made it
    license: str = ""  # under which it may be used
    data_license: str = ""  # under which the clips may be used
    consent: str = ""  # of people shown or heard in the clips, in words
    description: str = ""  # what it is for
    ab_clips: int = 4  # prompts of the sheet with and without it; 0: no sheet

    def __post_init__(self) -> None:
        check_number("output.ab_clips", self.ab_clips)
        if (not self.name or self.name.startswith(".") or not self.name.isprintable()
                or any(sign in self.name for sign in '/\\:@"')):
            raise InputError(f"output.name is {self.name!r}; give a file's name, without / : @, "
                             "that doesn't begin with a dot")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The whole YAML file of a fine-tuning run."""

    model: str  # an embedded model's name, a folder of toybox or of the Wan family, or a hub id
    data: DataConfig  # clips and captions
    run: RunConfig  # steps, rates, folder
    method: Literal["lora", "full"] = "lora"  # "lora", or "full": all weights of the transformer
    lora: LoraSettings = field(default_factory=LoraSettings)  # of the method "lora"
    # which transformers of a model with two are trained, each on its own noise levels
    experts: Literal["both", "high", "low"] = "both"
    # how often each is drawn: text, first, last, both, frames, prefix, mask; None: what the model
    # can do, text most often
    conditions: dict[str, float] | None = None
    noise: NoiseSettings = field(default_factory=NoiseSettings)  # how the noise levels are drawn
    # a spare token that is learned along; of models whose tokenizer has some
    subject: SubjectSettings | None = None
    # recompute blocks in the backward pass instead of keeping what they hold
    checkpointing: bool = False
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    tensorboard: bool = False  # also write TensorBoard's event files into the run's folder

    def __post_init__(self) -> None:
        if self.method == "lora" and self.run.optim.muon_lr:
            raise InputError(
                "run.optim.muon_lr is for the method full: Muon makes whole matrices' updates "
                "orthogonal, which a LoRA's thin factors aren't; leave it out")
        if self.method == "full" and self.subject is not None:
            raise InputError("subject goes with the method lora, whose file carries the embedding")
        every = self.validation.sheet_every
        if every % self.run.validate_every:
            raise InputError(
                f"validation.sheet_every is {every}; it must be a multiple of run.validate_every, "
                f"{self.run.validate_every}")
