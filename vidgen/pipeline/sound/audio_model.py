"""Sound of diffusers' text-to-audio pipelines, which are in memory only while they run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vidgen.core.errors import InputError, ModelError
from vidgen.pipeline.diffusers_backend.pipe import LoadedPipeline, OnProgress, stepping
from vidgen.pipeline.diffusers_backend.plan import defaults_of
from vidgen.pipeline.loader import DTYPES
from vidgen.weights.folder import DiffusersFolder
from vidgen.weights.layouts import open_model

if TYPE_CHECKING:
    from vidgen.media.types import Samples

LENGTHS = {"StableAudioPipeline": "audio_end_in_s", "StableAudio3Pipeline": "duration",
           "AudioLDM2Pipeline": "audio_length_in_s"}
"""Pipelines, with the parameter of their call for the length in seconds."""
_MAX_S = {"StableAudio3Pipeline": 384.0, "AudioLDM2Pipeline": 600.0}
_SETTINGS = ("num_inference_steps", "guidance_scale")


@dataclass(frozen=True)
class AudioModel:
    """A text-to-audio model for the sound of clips."""

    folder: DiffusersFolder  # as diffusers saves it
    prompt: str  # of the sound
    seconds: float  # of the clip
    device: torch.device
    dtype: str  # "fp32" on the CPU, where some of its parts support no other
    offload: str  # "none", "stage" or "block"

    def facts(self) -> dict[str, Any]:
        """Return all facts but the seed that decide the sound, for the recipe."""
        import diffusers

        own = defaults_of(getattr(diffusers, self.folder.class_name))
        return {"path": str(self.folder.path.resolve()), "class": self.folder.class_name,
                "sha256": self.folder.content_hash, "prompt": self.prompt, "seconds": self.seconds,
                "dtype": self.dtype, **{name: own.get(name) for name in _SETTINGS},
                "diffusers": version("diffusers"), "transformers": version("transformers")}

    def load(self) -> LoadedPipeline:
        """Load the model; raise ModelError if files are missing or damaged."""
        return LoadedPipeline(self.folder, self.device, DTYPES[self.dtype], self.offload)

    def make(
        self, seed: int, on_step: OnProgress, place: LoadedPipeline | None = None
    ) -> tuple[Samples, int]:
        """Return the sound of a seed, float32 [samples, channels], and its rate.

        It is as long as the clip, or the model's longest; the noise is drawn on the CPU. Without
        `place`, the result of `load`, load the model for this sound alone.

        Raises:
            ModelError: missing or damaged files, or too little memory.
            InputError: the pipeline refuses the arguments.
        """
        pipe, name = (place or self.load()).taking(None), self.folder.class_name
        longest = _MAX_S.get(name) or float(pipe.transformer.config.sample_size
                                            * pipe.vae.hop_length / pipe.vae.config.sampling_rate)
        arguments = {"prompt": self.prompt, LENGTHS[name]: min(self.seconds, longest),
                     "generator": torch.Generator("cpu").manual_seed(seed)}
        try:
            with stepping(pipe, on_step):
                waves = pipe(**arguments).audios[0]
        except ValueError as error:
            raise InputError(f"{name} refuses this: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ModelError(f"{name} ran out of memory; give --offload stage or block") from error
        wave = torch.as_tensor(np.asarray(waves) if not torch.is_tensor(waves) else waves)
        wave = wave.detach().float().cpu()
        wave = wave[None] if wave.ndim == 1 else wave[:2]
        part = pipe.vocoder if name == "AudioLDM2Pipeline" else pipe.vae
        return wave.T.contiguous().numpy(), int(part.config.sampling_rate)


def open_audio_model(
    model: str, prompt: str, seconds: float, *, device: torch.device, dtype: str, offload: str
) -> AudioModel:
    """Open a text-to-audio model for later use; raise ModelError if it is none."""
    opened = open_model(model)
    kinds = ", ".join(LENGTHS)
    name = opened.class_name if isinstance(opened, DiffusersFolder) else f"{opened.family} model"
    if not isinstance(opened, DiffusersFolder) or name not in LENGTHS:
        raise ModelError(f"{model} is a {name}, which makes no sound from a text; --audio-model "
                         f"takes a folder of diffusers with one of {kinds}")
    dtype = "fp32" if device.type == "cpu" else dtype
    return AudioModel(opened, prompt, seconds, device, dtype, offload)
