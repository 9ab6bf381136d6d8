"""Variants of the Wan family and their defaults.

The values come from the published programs (`generate.py` and `wan/configs` of Wan-Video/Wan2.1 and
Wan2.2); the negative prompts from the releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from vidgen.core.errors import ModelError
from vidgen.models.dit_types import DiTConfig

Task = Literal[
    "text", "image", "last-image", "frames", "extend", "mask", "video", "reference", "control",
]
TASKS: tuple[Task, ...] = get_args(Task)
"""Inputs from which a model can generate; "text" means that a prompt alone is enough."""

Conditioning = Literal["tokens", "channels", "control", "none"]

LICENSE = "Apache-2.0"
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_STEADY = "镜头晃动，" + NEGATIVE_PROMPT
_SMALL = ((832, 480), (480, 832))
_LARGE = ((1280, 720), (720, 1280), *_SMALL)


@dataclass(frozen=True)
class ModelDefaults:
    """Default generation settings of a model.

    Args:
        guidance_scale: in a model with two experts, the high-noise expert's.
        guidance_scale_2: the low-noise expert's; None: the same.
        guidance_interval: (lowest, highest) sigma at which guidance applies.
        settings: settings of the model's optional features, by name; see
            `vidgen.pipeline.settings`.
        boundary: sigma; `transformer` runs at and above it, `transformer_2` below it.
        sizes: (width, height) of the training clips; other sizes cause a warning.
        max_frames: length of the longest training clips.
        history_noise: noise level of the earlier windows of a long clip, in models trained with it.
    """

    num_steps: int
    shift: float
    guidance_scale: float
    fps: float
    num_frames: int
    height: int
    width: int
    sampler: str = "unipc"
    negative_prompt: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    max_frames: int = 1_000_000
    guidance_scale_2: float | None = None
    boundary: float | None = None
    history_noise: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    settings: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A published Wan model: its tasks and defaults."""

    name: str
    family: str
    tasks: tuple[Task, ...]
    defaults: ModelDefaults = field(repr=False)


def _variant(
    name: str, tasks: tuple[Task, ...], *, version: str = "2.1", **defaults: Any
) -> Variant:
    settings: dict[str, Any] = {
        "num_steps": 50, "shift": 5.0, "guidance_scale": 5.0, "fps": 16.0, "num_frames": 81,
        "negative_prompt": NEGATIVE_PROMPT, "sizes": _LARGE,
    }
    settings |= defaults
    width, height = settings["sizes"][0]
    made = ModelDefaults(
        width=width, height=height, max_frames=settings["num_frames"], **settings
    )
    return Variant(name, f"wan{version}", tasks, made)


_T2V: tuple[Task, ...] = ("text", "video")
_I2V: tuple[Task, ...] = ("image",)
_FLF2V: tuple[Task, ...] = ("image", "last-image")
_VACE: tuple[Task, ...] = TASKS
_TI2V: tuple[Task, ...] = ("text", "image", "extend", "mask", "video")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _variant("t2v-1.3b", _T2V, sizes=_SMALL),
        _variant("t2v-14b", _T2V),
        _variant(
            "i2v-14b-480p", _I2V, num_steps=40, shift=3.0, negative_prompt=_STEADY, sizes=_SMALL
        ),
        _variant("i2v-14b-720p", _I2V, num_steps=40, negative_prompt=_STEADY),
        _variant("flf2v-14b", _FLF2V, shift=16.0, negative_prompt="镜头切换，" + _STEADY),
        _variant("vace-1.3b", _VACE, shift=16.0, sizes=_SMALL),
        _variant("vace-14b", _VACE, shift=16.0),
        _variant(
            "t2v-a14b", _T2V, version="2.2", num_steps=40, shift=12.0, guidance_scale=4.0,
            guidance_scale_2=3.0, boundary=0.875,
        ),
        _variant(
            "i2v-a14b", _FLF2V, version="2.2", num_steps=40, guidance_scale=3.5,
            guidance_scale_2=3.5, boundary=0.9,
        ),
        _variant(
            "ti2v-5b", _TI2V, version="2.2", fps=24.0, num_frames=121,
            sizes=((1280, 704), (704, 1280)),
        ),
    )
}


def recognise(
    dit: DiTConfig, *, num_experts: int, name: str, expand_timesteps: bool = False
) -> Variant:
    """Return the variant to which a transformer belongs.

    Args:
        num_experts: transformers of the model, 1 or 2.
        name: the folder's name, which alone distinguishes Wan 2.1's 480p and 720p image-to-video.
        expand_timesteps: True if known tokens have time 0; set in diffusers' TI2V folders.

    Raises:
        ModelError: no published variant has these numbers of channels.
    """
    large = dit.hidden_dim > 2048
    size = "14b" if large else "1.3b"
    if dit.control_layers:
        return VARIANTS[f"vace-{size}"]
    if dit.in_channels == dit.out_channels:
        if num_experts == 2:
            return VARIANTS["t2v-a14b"]
        if expand_timesteps or dit.in_channels == 48:
            return VARIANTS["ti2v-5b"]
        return VARIANTS[f"t2v-{size}"]
    if dit.in_channels != 2 * dit.out_channels + 4:
        raise ModelError(
            f"{name} has a transformer with {dit.in_channels} input and {dit.out_channels} output "
            f"channels; vidgen supports {', '.join(VARIANTS)}"
        )
    if dit.image_positions:
        return VARIANTS["flf2v-14b"]
    if dit.image_dim:
        return VARIANTS["i2v-14b-720p" if re.search(r"720", name) else "i2v-14b-480p"]
    variant = VARIANTS["i2v-a14b"]
    if num_experts == 1:  # a folder with one of the variant's two experts
        alone = replace(variant.defaults, boundary=None, guidance_scale_2=None)
        return replace(variant, defaults=alone)
    return variant


def models_with(task: str) -> list[str]:
    """List the variants that support a task."""
    return [name for name, variant in VARIANTS.items() if task in variant.tasks]
