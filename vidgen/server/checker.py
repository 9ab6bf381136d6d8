"""Check requests before they are queued: decode their files and make their plans.

No weights are loaded. Files are decoded in a separate process first; see `probe.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidgen.core.errors import VidgenError
from vidgen.core.request import Loading
from vidgen.core.runtime import best_dtype, choose_device
from vidgen.pipeline.plan import require_own_model, settle
from vidgen.pipeline.policy import enforce, policy_from_environment
from vidgen.pipeline.settings import SETTINGS, SOUND
from vidgen.pipeline.setups import choose
from vidgen.pipeline.sound.soundtrack import make_soundtrack
from vidgen.pipeline.types import Estimate
from vidgen.server.layout import FILM, files_of, sniff
from vidgen.server.making import plan_confined, planned_shots, request_of, script_data
from vidgen.server.probe import NamedFile, check_uploads
from vidgen.server.settings import Limits, at_most
from vidgen.server.types import ApiError, refusal
from vidgen.story.edit import make_edit
from vidgen.story.plan import enforce_film, estimates, word_remarks
from vidgen.weights.layouts import open_model

_POLICY = "content_policy_violation"
_SHORTER = "give fewer frames, or a higher fps"
_PICTURES = ("image", "last_image", "mask")
log = logging.getLogger(__name__)


class Checker:
    """Checks requests for one model against limits; safe to use from any thread.

    Raises:
        ModelError: the model can't be opened.
        InputError: diffusers runs the model.
    """

    def __init__(self, model: str, limits: Limits) -> None:
        self.folder = require_own_model(open_model(model))
        self.limits, self.policy = limits, policy_from_environment()
        self.device, self.offload = choose_device(), "none"
        self.dtype = best_dtype(self.device)
        self._planning = threading.Lock()

    def model(self) -> dict[str, Any]:
        """Return the model's tasks, license and defaults."""
        known = self.folder.defaults
        return {
            "id": self.folder.name, "tasks": list(self.folder.tasks),
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

    def clip(self, folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
        """Return a clip's plan, under the names of its answer, and `expected_s`.

        Raises:
            ApiError: the request is invalid or exceeds the limits, or a file is damaged.
            VidgenError: the check itself failed.
        """
        files = files_of(folder, spec["options"]).items()
        with self._checking((name, "picture" if name in _PICTURES else "video", path)
                            for name, path in files):
            request = request_of(folder, spec, self.folder)
            with refusing(_POLICY):
                enforce(self.policy, request)
            plan, limits = settle(self.folder, request), self.limits
            seconds = float(plan.kept_frames / plan.fps)
            at_most("pixels", plan.width * plan.height, limits.pixels)
            at_most("frames", plan.kept_frames, limits.frames, option="frames")
            at_most("seconds", seconds, limits.seconds, _SHORTER)
            at_most("steps", plan.num_steps, limits.steps, option="steps")
            for name, value in request.settings.items():
                if (limit := SETTINGS[name].served) is not None:
                    at_most(name, value, limit, option=name)
            has_sound = SOUND in self.folder.tasks
            make_soundtrack(request, plan.kept_frames, plan.fps, self, has_sound=has_sound)
            made = choose(self.folder, plan, request, Loading(), self.device, None,
                          dtype=self.dtype)
        return {
            "width": plan.width, "height": plan.height, "num_frames": plan.kept_frames,
            "fps": str(plan.fps), "num_inference_steps": plan.num_steps, "seed": plan.seed,
            "guidance_scale": plan.guidance.scale, "negative_prompt": plan.negative,
            "prompt": plan.prompt, "seconds": seconds, "expected_s": _without_loading([made]),
        }

    def film(self, path: Path, draft: bool) -> dict[str, Any]:
        """Return a film's plan: shots, width, height, fps, seconds, expected_s, script, notes.

        Raises:
            ApiError: the script is invalid or exceeds the limits, or a file is damaged.
            VidgenError: the check itself failed.
        """
        with self._checking(_files_with(path)):
            film = plan_confined(path, self.folder, draft=draft, dtype=self.dtype)
            shots, limits = list(film.shots.values()), self.limits
            at_most("shots (takes counted)", sum(len(plan.takes) for plan in shots), limits.shots)
            at_most("pixels", film.size[0] * film.size[1], limits.pixels)
            parts = [(plan, take, index) for plan in shots for take in plan.takes
                     for index in range(len(take.parts))]
            for plan, take, index in parts:
                name, count = plan.shot.id, plan.num_frames
                request = film.request(plan.shot, take.seed, index, take.parts[index].num_frames)
                at_most(f"frames of shot {name}", count, limits.frames)
                at_most(f"seconds of shot {name}", float(count / film.fps), limits.seconds,
                        _SHORTER)
                at_most(f"steps of shot {name}", request.steps or 0, limits.steps)
            with refusing(_POLICY):
                enforce_film(self.policy, film)
            edit = make_edit(film, film.in_film, path.with_name(FILM))
            return {
                "shots": planned_shots(film), "width": film.size[0], "height": film.size[1],
                "fps": str(film.fps), "title": film.script.project.title,
                "seconds": edit.facts()["duration_s"], "script": script_data(film.script),
                "notes": word_remarks(film, shots),
                "expected_s": _without_loading(estimates(film, parts, self.device, None)),
            }

    @contextmanager
    def _checking(self, files: Iterable[NamedFile]) -> Iterator[None]:
        """Decode files, then plan inside the block, one request at a time."""
        with refusing():
            check_uploads([*files], self.limits)
            with self._planning:
                yield


def _without_loading(made: Iterable[Estimate]) -> float:
    """Return the estimated seconds of a job without loading, as the model is open."""
    return sum(stage.seconds for one in made for stage in one.stages if stage.name != "load")


@contextmanager
def refusing(code: str = "invalid_request") -> Iterator[None]:
    """Raise a request's errors inside the block as ApiError, others as VidgenError."""
    try:
        yield
    except ApiError:
        raise
    except VidgenError as error:
        raise refusal(error, code) from None
    except Exception:
        log.exception("checking a request failed")
        raise VidgenError("the checks failed") from None


def _files_with(script: Path) -> Iterator[NamedFile]:
    """Yield a script and the files uploaded with it."""
    yield "script", "script", str(script)
    for path in sorted(script.parent.iterdir()):
        if path.stem != script.stem:
            name = f"file {path.name}"
            medium, _ = sniff(path, name, "picture", "video", "sound", "font")
            yield name, medium, str(path)
