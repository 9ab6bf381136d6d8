"""From a checked body to options of `Request`, its files laid down in the job's folder."""

from __future__ import annotations

import base64
import binascii
import secrets
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vidgen.core.errors import InputError, nearest
from vidgen.server.body import write_upload
from vidgen.server.errors import ApiError, from_validation
from vidgen.server.fetch import fetch
from vidgen.server.jobs import Jobs
from vidgen.server.layout import INPUTS, VIDEO, Medium, link, sniff
from vidgen.server.schema import ExtraParams, LoraAsk, Shape, Strict
from vidgen.server.settings import Settings
from vidgen.server.types import Upload

Ask = TypeVar("Ask", bound=Strict)
_OPTIONS = {
    "prompt": "prompt", "seconds": "seconds", "num_frames": "frames", "fps": "fps", "seed": "seed",
    "negative_prompt": "negative", "num_inference_steps": "steps", "guidance_scale": "guidance",
    "flow_shift": "shift", "strength": "strength", "voice": "voice",
}


class Place:
    """The folder of a new job; it is removed unless the job is queued, which `is_kept` says."""

    def __init__(self, job_id: str, folder: Path) -> None:
        self.id, self.folder, self.is_kept = job_id, folder, False

    @property
    def inputs(self) -> Path:
        """Folder of the files that came in."""
        return self.folder / INPUTS


class Translator:
    """Translates bodies to options; clips of `jobs` may be inputs, `model` is the served one."""

    def __init__(self, settings: Settings, jobs: Jobs, model: str) -> None:
        self.settings, self.jobs, self.model = settings, jobs, model

    @property
    def loras(self) -> list[str]:
        """Names of the adapters that requests may name."""
        folder = self.settings.loras
        if folder is None:
            return []
        return sorted(path.stem for path in folder.glob("*.safetensors"))

    def options(self, ask: Any) -> dict[str, Any]:
        """Return the fields of `Request` that need no files; draw a seed if none is given."""
        self.check_model(ask.model)
        given = ask.model_dump(exclude_none=True)
        options = {ours: given[name] for name, ours in _OPTIONS.items() if name in given}
        options |= given.get("extra_params", {})
        options.setdefault("seed", secrets.randbelow(2**31))
        if isinstance(ask, Shape):
            if ask.width is not None:
                options["size"] = f"{ask.width}x{ask.height}"
            elif ask.size is not None:
                options["size"] = ask.size
            if ask.generate_sound is not None:
                options["audio"] = "generate" if ask.generate_sound else "none"
            if ask.say:
                options["say"] = [each if isinstance(each, str) else list(each) for each in ask.say]
            if ask.lora:
                options["lora"] = [self._lora(each) for each in ask.lora]
        return options

    def inputs(self, ask: Any, owner: str, place: Place) -> dict[str, Any]:
        """Put files into the job's folder; return the fields of `Request` that name them."""
        options: dict[str, Any] = {}
        wanted: tuple[tuple[str, str, tuple[Medium, ...]], ...] = (
            ("input_reference", "image", ("picture", "video")),
            ("image_reference", "image", ("picture",)),
            ("last_image_reference", "last_image", ("picture",)),
            ("video_reference", "video", ("video",)),
            ("audio_reference", "audio", ("sound",)),
        )
        for name, option, media in wanted:
            reference = getattr(ask, name, None)
            if reference is None:
                continue
            path = self.lay_down(reference, name, owner, place, *media)
            if name == "input_reference" and path.endswith((".mp4", ".webm", ".mkv")):
                option = "video"  # noqa: PLW2901
            if option in options:
                raise ApiError(400, "invalid_request", f"{name} and another field both give the "
                               f"{option}; give one of them", name)
            options[option] = path
        return options

    def lay_down(
        self, reference: Upload | str | dict[str, str], name: str, owner: str, place: Place,
        *media: Medium,
    ) -> str:
        """Put an input into the job's folder; return its path from there."""
        if isinstance(reference, dict):
            source = self.jobs.get(reference["id"], owner)
            if source is None or source.kind != "video":
                raise ApiError(404, "not_found", f"there is no video {reference['id']!r}", name)
            if source.status != "completed":
                raise ApiError(409, "not_completed", f"the video {source.id} {source.stands}; "
                               "give one that is completed", name)
            if "video" not in media:
                raise ApiError(400, "invalid_request", f"{name} is a video; give a picture", name)
            target = place.inputs / f"{name}.mp4"
            link(self.settings.job_folder(source.id) / VIDEO, target)
            return f"{INPUTS}/{target.name}"
        if isinstance(reference, str):
            reference = self._from_url(reference, name, place)
        try:
            _, suffix = sniff(reference.path, name, *media)
        except InputError as error:
            raise ApiError(400, "invalid_request", str(error), name) from None
        target = place.inputs / f"{name}{suffix}"
        reference.path.replace(target)
        return f"{INPUTS}/{target.name}"

    def _from_url(self, url: str, name: str, place: Place) -> Upload:
        if url.startswith("data:"):
            head, _, text = url.partition(",")
            if not head.endswith(";base64"):
                raise ApiError(400, "invalid_value", f"{name} must be data:TYPE;base64,...", name)
            try:
                content = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise ApiError(400, "invalid_value", f"{name} is no base64", name) from None
        elif not self.settings.fetch:
            raise ApiError(400, "urls_disabled", f"{name} is an address, which this service "
                           "doesn't look at; send the file, or a data: URL", name)
        else:
            try:
                content = fetch(url, self.settings.limits.upload_bytes)
            except InputError as error:
                raise ApiError(400, "invalid_url", f"{name}: {error}", name) from None
        return write_upload(content, place.folder)

    def _lora(self, asked: LoraAsk | str) -> str:
        if isinstance(asked, str):
            name, _, scale = asked.partition(":")
            asked = parse(LoraAsk, {"name": name, **({"scale": scale} if scale else {})})
        if asked.name not in self.loras:
            raise ApiError(400, "invalid_value", f"unknown lora {asked.name!r}; "
                           f"{nearest(asked.name, self.loras)}", "lora")
        assert self.settings.loras is not None
        path = self.settings.loras.resolve() / f"{asked.name}.safetensors"
        return f"{path}:{asked.scale:g}"

    def check_model(self, asked: str | None) -> None:
        """Refuse any model but the served one.

        Raises:
            ApiError: another model.
        """
        if asked not in (None, self.model):
            raise ApiError(404, "model_not_found", f"there is no model {asked!r}; this service has "
                           f"{self.model!r}", "model")


def parse(ask: type[Ask], fields: dict[str, Any]) -> Ask:
    """Check a body's fields.

    Raises:
        ApiError: names the first invalid field.
    """
    try:
        return ask.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, {
            None: ask.model_fields, "extra_params": ExtraParams.model_fields,
            "lora": LoraAsk.model_fields}) from None
