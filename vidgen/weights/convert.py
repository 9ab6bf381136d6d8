"""Convert a model folder to another layout, bit for bit and reversibly.

Data that the target layout can't express is kept for converting back: the contents of `model.json`
and vidgen's configs go into `vidgen.json`, and tensors keep vidgen's names. Unknown tensors are
errors. In Wan's layout the VAE and encoders are pickles, as Wan's programs read them; all other
weights are safetensors.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vidgen.core.config import dump
from vidgen.core.errors import InputError, ModelError
from vidgen.core.runtime import atomic_path, check_output
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import ImageConfig, image_processor
from vidgen.models.text import TextConfig
from vidgen.models.vae import VAEConfig
from vidgen.weights.component import OWN_ROLES, Component, Config, extra_in, table_of
from vidgen.weights.configs import (
    dit_to_diffusers,
    dit_to_wan,
    encoder_to_transformers,
    vae_to_diffusers,
)
from vidgen.weights.folder import FEW_STEP, DiffusersFolder, ModelFolder, write_model_info
from vidgen.weights.keymap import Spelling, fuse_clip, rename
from vidgen.weights.layouts import (
    CLIP_FILE,
    CLIP_TOKENIZER,
    EXPERTS,
    NOTE,
    TEXT_FILE,
    VAE_FILES,
    WAN_TOKENIZER,
)
from vidgen.weights.tensors import Lazy, held
from vidgen.weights.write import (
    MAX_SHARD_BYTES,
    write_json,
    write_pth,
    write_shards,
)

log = logging.getLogger(__name__)

_MAGNITUDES = "magnitudes.json"
_KEPT = ("preview", CLIP_TOKENIZER, "*.md", "LICENSE*")
"""Files and folders that are copied whatever the layout and the weights."""
_AS_IS: Mapping[str, Mapping[str, Tensor]] = {}


def convert(
    source: ModelFolder | DiffusersFolder, target: Path, to: Spelling, *,
    max_shard_bytes: int = MAX_SHARD_BYTES, changed: Mapping[str, Mapping[str, Tensor]] = _AS_IS,
) -> list[str]:
    """Write a model in another layout; the target folder appears only when it is complete.

    Args:
        to: "diffusers": for `from_pretrained` of diffusers' Wan pipelines. "wan": for Wan's own
            programs. "vidgen": vidgen's layout, with hashes.
        changed: tensors, by role and vidgen's name, that replace the files' and are cast to their
            dtype; only with `to` "vidgen". The few-step adapter and magnitudes belong to the old
            weights and are not copied then.

    Returns:
        Tensors for which the target layout has no name, sorted.

    Raises:
        ModelError: the target exists, a tensor is unknown or missing, or the source is of another
            family.
        InputError: the source has this layout already.
        OutputError: the target can't be written.
    """
    if isinstance(source, DiffusersFolder):
        raise ModelError(
            f"{source.path} is a {source.class_name}; only Wan and toybox models can be converted"
        )
    assert to == "vidgen" or not changed
    if source.layout == to and not changed:
        raise InputError(f"{source.path} has the layout {to!r} already")
    if target.exists():
        raise ModelError(f"{target} exists already; give the path of a new folder")
    check_output(target, num_bytes=source.num_bytes)
    if source.layout == "vidgen":
        assert source.content_hash  # raises ModelError if a file's hash isn't the recorded one
    unnamed: list[str] = []
    with atomic_path(target) as folder:
        folder.mkdir()
        for role, component in source.components.items():
            component.require_complete()
            if role in OWN_ROLES:  # no other layout has these
                shutil.copytree(source.path / role, folder / role)
                continue
            tensors = _renamed(component, to, unnamed, changed.get(role, {}))
            if to == "wan":
                _write_wan(folder, source, component, tensors, max_shard_bytes)
            else:
                _write_part(folder, component, tensors, to, max_shard_bytes)
            component.tensors.release()
        # the few-step adapter and magnitudes belong to the source's weights
        kept = _KEPT if changed else (*_KEPT, FEW_STEP, _MAGNITUDES)
        for path in (path for name in kept for path in source.path.glob(name)):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)
        if changed and (source.path / _MAGNITUDES).is_file():
            log.warning("%s of %s belongs to the old weights and is not copied; run vidgen models "
                        "--measure to measure the new ones", _MAGNITUDES, source.name)
        tokenizer = WAN_TOKENIZER if to == "wan" else "tokenizer"
        shutil.copytree(source.tokenizer, folder / tokenizer)
        if to == "vidgen":
            _write_processor(folder, source)
            write_model_info(
                folder, name=source.name, family=source.family, license_name=source.license,
                tasks=source.tasks, defaults=source.defaults, variant=source.variant,
            )
            return sorted(unnamed)
        if to == "diffusers":
            _write_index(folder, source, has_processor=_write_processor(folder, source))
        else:
            _warn_of_clip(source)
        write_json(folder / NOTE, {
            "name": source.name, "family": source.family, "variant": source.variant,
            "license": source.license, "tasks": list(source.tasks),
            "defaults": asdict(source.defaults),
            "configs": {role: dump(part.config) for role, part in source.components.items()
                        if role not in OWN_ROLES},
        })  # fmt: skip
    return sorted(unnamed)


def _renamed(
    component: Component[Config], to: Spelling, unnamed: list[str], changed: Mapping[str, Tensor]
) -> dict[str, Lazy]:
    """Return a component's tensors by a layout's names, and add the others to `unnamed`."""
    tensors, table = dict[str, Lazy](), table_of(component.role, component.config)
    for name, lazy in component.tensors.items():
        new = name if to == "vidgen" else rename(name, table, "vidgen", to)
        if new is None:
            unnamed.append(name)
        is_new = name in changed
        tensors[new or name] = held(changed[name], lazy.likeness.dtype) if is_new else lazy
    assert changed.keys() <= tensors.keys(), "names of another model"
    if component.role == "image_encoder":
        unnamed += [name for name in component.extra if extra_in(name) != to]
        tensors |= component.extra
    return tensors


def _write_part(
    folder: Path, part: Component[Config], tensors: Mapping[str, Lazy], to: Spelling, limit: int
) -> None:
    """Write a component's folder in vidgen's or diffusers' layout."""
    config: dict[str, Any]
    if isinstance(part.config, TextConfig | ImageConfig):  # both layouts use transformers' config
        config = encoder_to_transformers(part.config)
    elif to == "diffusers" and isinstance(part.config, VAEConfig):
        config = vae_to_diffusers(part.config)
    elif to == "diffusers" and isinstance(part.config, DiTConfig):
        config = dit_to_diffusers(part.config)
    else:
        config = dump(part.config)
    is_plain = to == "vidgen" or part.role.endswith("encoder")
    stem = "model" if is_plain else "diffusion_pytorch_model"
    write_shards(folder / part.role, stem, tensors, limit)
    write_json(folder / part.role / "config.json", config)


def _write_wan(
    folder: Path, source: ModelFolder, part: Component[Config], tensors: Mapping[str, Lazy],
    limit: int,
) -> None:
    if isinstance(part.config, DiTConfig):
        place = folder / EXPERTS[part.role] if "transformer_2" in source.components else folder
        write_shards(place, "diffusion_pytorch_model", tensors, limit)
        write_json(place / "config.json", dit_to_wan(part.config, _model_type(part.config)))
    elif isinstance(part.config, VAEConfig):
        old, new = VAE_FILES.values()
        name = new if part.config.stage_shortcuts else old
        write_pth(folder / f"{name}.pth", tensors)
    elif part.role == "image_encoder":
        write_pth(folder / f"{CLIP_FILE}.pth", fuse_clip(tensors))
    else:
        write_pth(folder / f"{TEXT_FILE}.pth", tensors)


def _model_type(dit: DiTConfig) -> str:
    """Return `model_type` of Wan's `config.json`."""
    if dit.control_layers:
        return "vace"
    if dit.in_channels > dit.out_channels:
        return "flf2v" if dit.image_positions else "i2v"
    return "ti2v" if dit.out_channels == max(VAE_FILES) else "t2v"


def _write_index(folder: Path, source: ModelFolder, *, has_processor: bool) -> None:
    """Write diffusers' `model_index.json` and its scheduler's config."""
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
        "use_flow_sigmas": True, "flow_shift": source.defaults.shift, "num_train_timesteps": 1000,
    }
    if source.defaults.sampler == "euler":
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": source.defaults.shift,
            "num_train_timesteps": 1000,
        }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    dit = source.components["transformer"].config
    pipeline = {"control": "WanVACEPipeline", "channels": "WanImageToVideoPipeline"}
    transformer = ["diffusers", dit_to_diffusers(dit)["_class_name"]]
    trained = folder / "tokenizer" / "tokenizer_config.json"
    plain = trained.is_file() and '"PreTrainedTokenizerFast"' in trained.read_text("utf-8")
    index: dict[str, Any] = {
        "_class_name": pipeline.get(source.conditioning, "WanPipeline"),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast" if plain else "T5TokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if "transformer_2" in source.components else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "boundary_ratio": source.defaults.boundary,
    }
    if source.conditioning != "control":
        index["expand_timesteps"] = source.variant == "ti2v-5b"
    if has_processor:
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    elif source.conditioning == "channels":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    write_json(folder / "model_index.json", index)


def _warn_of_clip(source: ModelFolder) -> None:
    part = source.components.get("image_encoder")
    if part is not None and not any(name.startswith("textual.") for name in part.extra):
        log.warning(
            "%s has no text tower of CLIP: vidgen doesn't need it, but Wan's own programs do; for "
            "those, copy %s.pth and %s/ from the release", source.name, CLIP_FILE, CLIP_TOKENIZER,
        )


def _write_processor(folder: Path, source: ModelFolder) -> bool:
    """Copy the image processor's settings, or write CLIP's; return False for models without one."""
    if "image_encoder" not in source.components:
        return False
    if source.image_processor is not None:
        shutil.copytree(source.image_processor, folder / "image_processor")
        return True
    size = source.components["image_encoder"].config.image_size
    image_processor(size).save_pretrained(folder / "image_processor")
    return True
