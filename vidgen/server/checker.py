"""The process that checks requests before they are queued: it decodes files and makes plans.

It holds no weights. Questions, each with an `id`, and their answers:
    {"ask": "model"}                    the model's abilities
    {"ask": "clip", "folder", "spec"}   the clip's plan
    {"ask": "film", "path", "draft"}    the film's plan
An answer is {"event": "answer", "id", "result"}, or {"event": "answer", "id", "code", "text"}.
"""

from __future__ import annotations

import logging
import queue
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, VidgenError
from vidgen.server.ipc import Message, Parent, TellingHandler
from vidgen.server.layout import is_font, sniff
from vidgen.server.settings import Limits
from vidgen.server.types import FAILED, POLICY

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.types import Plan

_SHORTER, _SMALLER = "ask for fewer frames, or a higher fps", "send it smaller"
log = logging.getLogger(__name__)


class Checker:
    """Answers questions about one model, within limits.

    Raises:
        ModelError: it can't be opened, or runs through diffusers.
    """

    def __init__(self, model: str, limits: Limits) -> None:
        from vidgen.core.runtime import best_dtype, choose_device
        from vidgen.pipeline.plan import require_own_model
        from vidgen.pipeline.policy import policy_from_environment
        from vidgen.weights.layouts import open_model

        self.folder = require_own_model(open_model(model))
        self.limits, self.policy = limits, policy_from_environment()
        self.device, self.offload = choose_device(), "none"
        self.dtype = best_dtype(self.device)

    def model(self) -> dict[str, Any]:
        """Return the model's abilities."""
        from vidgen.pipeline.tasks import SOUND

        known = self.folder.defaults
        return {
            "name": self.folder.name, "tasks": list(self.folder.tasks),
            "license": self.folder.license,
            "defaults": {
                "seconds": known.num_frames / known.fps, "size": f"{known.width}x{known.height}",
                "fps": known.fps, "num_frames": known.num_frames,
                "num_inference_steps": known.num_steps, "guidance_scale": known.guidance_scale,
                "negative_prompt": known.negative_prompt, "max_frames": known.max_frames,
                "sizes": [f"{width}x{height}" for width, height in known.sizes],
            },
            "makes_sound": SOUND in self.folder.tasks,
        }

    def clip(self, folder: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Return a clip's plan: width, height, num_frames, fps, num_steps, seconds, expected_s.

        Raises:
            InputError: a request that can't be made, a bad file, or more than the limits.
        """
        from vidgen.core.request import Loading
        from vidgen.pipeline.plan import settle
        from vidgen.pipeline.settings import served_limits
        from vidgen.pipeline.setups import choose
        from vidgen.pipeline.sound.soundtrack import make_soundtrack
        from vidgen.pipeline.tasks import SOUND
        from vidgen.server.making import request_of

        self._check_files(Path(folder), spec["options"])
        request = request_of(Path(folder), spec, self.folder)
        self._enforce(request)
        plan = settle(self.folder, request)
        self._check_plan(plan)
        for name, limit in served_limits(request).items():
            self._at_most(name, request.settings[name], limit)
        has_sound = SOUND in self.folder.tasks
        make_soundtrack(request, plan.kept_frames, plan.fps, self, has_sound=has_sound)
        made = choose(self.folder, plan, request, Loading(), self.device, None,
                      dtype=self.dtype)
        expected_s = sum(stage.seconds for stage in made.stages if stage.name != "load")
        return {
            "width": plan.width, "height": plan.height, "num_frames": plan.kept_frames,
            "fps": str(plan.fps), "num_steps": plan.num_steps, "seed": plan.seed,
            "guidance": plan.guidance.scale, "negative": plan.negative, "prompt": plan.prompt,
            "seconds": float(plan.kept_frames / plan.fps), "expected_s": expected_s,
        }

    def film(self, path: str, draft: bool) -> dict[str, Any]:
        """Return a film's plan: shots, width, height, fps, seconds, expected_s, script, notes.

        Raises:
            InputError: a film that can't be made, a bad file, or more than the limits.
        """
        from vidgen.server.film_making import plan_confined, planned_shots, script_data
        from vidgen.server.layout import FILM
        from vidgen.story.edit import make_edit
        from vidgen.story.plan import enforce_film, estimates, word_remarks

        self._check_beside(Path(path))
        film = plan_confined(Path(path), self.folder, draft=draft, dtype=self.dtype)
        takes = sum(len(plan.takes) for plan in film.shots.values())
        self._at_most("shots, takes counted,", takes, self.limits.shots)
        self._at_most("pixels", film.size[0] * film.size[1], self.limits.pixels)
        parts = [(plan, take, index) for plan in film.shots.values() for take in plan.takes
                 for index in range(len(take.parts))]
        for plan, take, index in parts:
            name, num_frames = plan.shot.id, take.parts[index].num_frames
            request = film.request(plan.shot, take.seed, index, num_frames)
            self._at_most(f"frames of shot {name}", plan.num_frames, self.limits.frames)
            self._at_most(f"seconds of shot {name}", float(plan.num_frames / film.fps),
                          self.limits.seconds, _SHORTER)
            self._at_most(f"steps of shot {name}", request.steps or 0, self.limits.steps)
        try:
            enforce_film(self.policy, film)
        except InputError as error:
            raise Refused(str(error)) from None
        made = estimates(film, parts, self.device, None, self.dtype)
        edit = make_edit(film, film.in_film, Path(path).with_name(FILM))
        return {
            "shots": planned_shots(film), "width": film.size[0], "height": film.size[1],
            "fps": str(film.fps), "seconds": edit.facts()["duration_s"],
            "title": film.script.project.title, "script": script_data(film.script),
            "notes": word_remarks(film, list(film.shots.values())),
            "expected_s": sum(stage.seconds for one in made for stage in one.stages
                              if stage.name != "load"),
        }

    def _check_files(self, folder: Path, options: dict[str, Any]) -> None:
        """Check files by their heads alone, before anything is decoded."""
        from vidgen.core.request import NO_AUDIO, OWN_AUDIO

        for name in ("image", "last_image", "mask"):
            if options.get(name) is not None:
                self._check_picture(name, folder / options[name])
        for name in ("video", "prefix", "audio"):
            if options.get(name) not in (None, NO_AUDIO, OWN_AUDIO):
                self._check_streams(name, folder / options[name])

    def _check_beside(self, script: Path) -> None:
        """Check the files that came with a script in the same way."""
        for path in sorted(script.parent.iterdir()):
            if path.stem == script.stem or is_font(path):
                continue
            name = f"file {path.name}"
            medium, _ = sniff(path, name, "picture", "video", "sound")
            check = self._check_picture if medium == "picture" else self._check_streams
            check(name, path)

    def _check_picture(self, name: str, path: Path) -> None:
        from PIL import Image

        from vidgen.media.read import decoding

        with decoding(name, "save it again"), Image.open(path) as image:
            self._at_most(f"pixels of {name}", image.width * image.height,
                          self.limits.input_pixels, _SMALLER)

    def _check_streams(self, name: str, path: Path) -> None:
        from vidgen.media.probe import probe

        facts = probe(path)
        for stream in facts["streams"]:
            area = stream.get("width", 0) * stream.get("height", 0)
            self._at_most(f"pixels of {name}", area, self.limits.input_pixels, _SMALLER)
        self._at_most(f"seconds of {name}", facts.get("duration_s") or 0.0,
                      self.limits.input_seconds, "send less of it")

    def _check_plan(self, plan: Plan) -> None:
        self._at_most("pixels", plan.width * plan.height, self.limits.pixels)
        self._at_most("frames", plan.kept_frames, self.limits.frames)
        self._at_most("seconds", float(plan.kept_frames / plan.fps), self.limits.seconds, _SHORTER)
        self._at_most("steps", plan.num_steps, self.limits.steps)

    def _enforce(self, request: Request) -> None:
        from vidgen.pipeline.policy import enforce

        try:
            enforce(self.policy, request)
        except InputError as error:
            raise Refused(str(error)) from None

    @staticmethod
    def _at_most(what: str, value: float, limit: float, remedy: str = "ask for less") -> None:
        if value > limit:
            raise InputError(f"{value:,.9g} {what} are asked for; this service takes {limit:,.9g}: "
                             f"{remedy}")


class Refused(InputError):
    """The policy refuses a prompt."""


def main() -> None:
    """Run as a process: MODEL, and the limits' values in order."""
    questions: queue.Queue[Message] = queue.Queue()
    parent = Parent(questions.put)
    root = logging.getLogger()
    root.handlers = [TellingHandler(parent, lambda: None)]
    root.setLevel(logging.WARNING)
    limits = Limits.of(sys.argv[2:])
    try:
        checker = Checker(sys.argv[1], limits)
    except VidgenError as error:
        parent.tell({"event": "broken", "text": str(error)})
        return
    parent.tell({"event": "ready", "model": checker.model()})
    while True:
        question = questions.get()
        arguments = {k: v for k, v in question.items() if k not in ("id", "ask")}
        try:
            answer = {"result": getattr(checker, question["ask"])(**arguments)}
        except Refused as error:
            answer = {"code": POLICY, "text": str(error)}
        except VidgenError as error:
            answer = {"code": "invalid_request", "text": str(error)}
        except Exception:
            log.exception("a question could not be answered")
            answer = {"code": FAILED, "text": "the checks failed"}
        parent.tell({"event": "answer", "id": question["id"], **answer})


if __name__ == "__main__":
    main()
