"""From shots to requests, their addresses, and the time and memory that they take.

A shot's address covers the request of each of its parts, the model's files, adapters, pictures, and
the addresses of the shots that it continues or shows. So a change reaches all shots that depend on
it, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from vidgen import __version__
from vidgen.core.errors import InputError, located
from vidgen.core.request import Loading, Request
from vidgen.core.runtime import best_dtype, sha256_file
from vidgen.core.shapes import check_num_frames, nearest_sizes, num_frames_for_seconds
from vidgen.core.store import address_of
from vidgen.media.read import check_image
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.denoise import hashes_of
from vidgen.pipeline.plan import make_plan, require_own_model, require_short
from vidgen.pipeline.policy import Policy, enforce, require_allowed
from vidgen.pipeline.recipe import asked_options
from vidgen.pipeline.settings import check_tasks, own_value
from vidgen.pipeline.setups import choose
from vidgen.story.elements import ShotFrame
from vidgen.story.film import FilmPlan, Part, ShotPlan, Take
from vidgen.story.script import Script, Shot
from vidgen.weights.family import models_with
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    import torch

    from vidgen.pipeline.types import Estimate, Offload
    from vidgen.story.store import ShotStore
    from vidgen.weights.folder import DiffusersFolder, ModelFolder

log = logging.getLogger(__name__)

LONGEST_S = 3600
ADDRESS_VERSION = 1
"""Version of the rules for addresses and files; another one renders every shot again."""
DRAFT_ASPECT = 0.1
"""Most that the aspects of a draft and its film differ, as a logarithm."""


def plan_film(
    script: Script, folder: ModelFolder | DiffusersFolder, *, suffix: str = ".mp4",
    draft: bool = False, dtype: str | None = None, quantize: str | None = None,
    tiles: str = "auto",
) -> FilmPlan:
    """Plan every shot of a checked script; a draft has small pictures and few steps.

    `dtype` replaces the script's own; `quantize` and `tiles` are as in `load`.

    Raises:
        InputError: a shot that can't be made, with its line and the nearest that can.
    """
    folder = require_own_model(folder)
    project, defaults = script.project, folder.defaults
    with located(f"{script.path}: project"):
        asked = Request(prompt="-", fps=project.fps, size=project.size or (  # type: ignore[arg-type]
            defaults.width, defaults.height))
    fps = asked.fps or Fraction(defaults.fps).limit_denominator(1001)
    size = asked.size or (defaults.width, defaults.height)
    film = FilmPlan(
        script, folder, fps, _draft_size(folder, size) if draft else size, suffix,
        {"dtype": dtype or project.dtype, "quantize": quantize, "tiles": tiles}, draft)
    planner = _Planner(film)
    for shot in script.order():
        with located(script.where(shot)):
            film.shots[shot.id] = planner.plan(shot)
    for warning in planner.warnings:
        log.warning("%s", warning)
    return film


def enforce_film(policy: Policy | None, film: FilmPlan) -> None:
    """Refuse a film whose prompts, music or speech a policy refuses.

    Raises:
        InputError: with the shot's line and the policy's reason.
    """
    if policy is None:
        return
    for plan in film.shots.values():
        shot, take = plan.shot, plan.takes[0]
        with located(film.script.where(shot)):
            for index, part in enumerate(take.parts):
                request = film.request(shot, take.seed, index, part.num_frames)
                enforce(policy, request)
            require_allowed(policy, "music", shot.music.prompt if shot.music else None, request)
            for line in shot.narration:
                require_allowed(policy, "speech", line.text, request)


def estimates(
    film: FilmPlan, parts: Iterable[tuple[ShotPlan, Take, int]], device: torch.device,
    have: int | None, offload: Offload | None = None,
) -> Iterator[Estimate]:
    """Yield the time and memory that parts of a film take; read headers, measure nothing.

    Each part is the shot, the take, and the part's index. `have` is the number of bytes that are
    free, None if unknown; `offload` as in `load`, None for the least that fits.

    Raises:
        ModelError: a part that doesn't fit the memory, with its shot and what would fit.
    """
    known: dict[Any, Estimate] = {}
    dtype = film.loading["dtype"] or best_dtype(device)
    shown_again = int(own_value("overlap", film.folder)) * _configs(film.folder)[0].strides.t
    for plan, take, index in parts:
        goes_on = index > 0 or plan.shot.continue_from is not None
        num_frames = take.parts[index].num_frames + (shown_again if goes_on else 0)
        request = film.request(plan.shot, take.seed, index, num_frames)
        shape = (num_frames, request.steps, request.guidance == 1, len(request.reference),
                 request.image is None, request.last_image is None, request.lora)
        if shape not in known:
            loading = Loading(offload=offload, **film.loading)
            with located(film.script.where(plan.shot)):
                known[shape] = choose(film.folder, make_plan(request, film.folder), request,
                                      loading, device, have, dtype=dtype)
        yield known[shape]


def film_facts(
    store: ShotStore, plans: Sequence[ShotPlan], device: torch.device, have: int | None,
    offload: Offload | None = None,
) -> dict[str, Any]:
    """Return a film's plan as JSON data: its whole, its shots, what each takes, and notes.

    A finished shot counts with the memory that it took.

    Raises:
        ModelError: as of `estimates`.
    """
    film, rows, notes = store.film, list[dict[str, Any]](), dict[str, None]()
    missing = [store.missing(plan) for plan in plans]
    parts = [[(plan, *part) for part in left or [(plan.takes[0], 0)]]
             for plan, left in zip(plans, missing, strict=True)]
    made = estimates(film, chain(*parts), device, have, offload)
    for plan, left, own in zip(plans, missing, parts, strict=True):
        needed = [*islice(made, len(own))]
        notes |= dict.fromkeys(one.choice for one in needed if one.choice)
        seconds = sum(s.seconds for (_, take, index), one in zip(own, needed, strict=True)
                      if not store.has(take.parts[index].key)  # else only its score is missing
                      for s in one.stages if s.name != "load")
        rows.append({
            "id": plan.shot.id, "num_frames": plan.num_frames,
            "duration_s": float(plan.num_frames / film.fps), "takes": len(plan.takes),
            "seed": plan.takes[0].seed, "address": plan.key, "needs": list(plan.shot.needs),
            "in_film": plan.shot.in_film, "rendered": not left, "parts_left": len(left),
            "seconds": seconds if left else 0.0,
            "peak_bytes": max(one.peak_bytes for one in needed),
            "measured": all(one.measured for one in needed)})
    whole = {
        "shots": len(rows), "rendered": sum(row["rendered"] for row in rows),
        "measured": all(row["measured"] for row in rows),
        "duration_s": sum(row["duration_s"] for row in rows if row["in_film"]),
        "seconds": sum(row["seconds"] for row in rows),
        "peak_bytes": max((row["peak_bytes"] for row in rows), default=0)}
    return {
        "film": whole, "fps": str(film.fps), "size": list(film.size), "model": film.folder.name,
        "available_bytes": have, "notes": [*notes, *word_remarks(film, plans)], "shots": rows}


def word_remarks(film: FilmPlan, plans: Sequence[ShotPlan]) -> list[str]:
    """Return remarks on words of the prompts that the model never learned, each once."""
    tokenizer = PromptTokenizer(film.folder.tokenizer, _configs(film.folder)[1].text_len)
    prompts = dict.fromkeys(part.prompt for plan in plans for part in plan.takes[0].parts)
    remarks = dict.fromkeys(remark for prompt in prompts
                            for remark in tokenizer.remarks(prompt, tokenizer.replacements(prompt)))
    return [*remarks]


class _Planner:
    def __init__(self, film: FilmPlan) -> None:
        self.film, self.folder = film, film.folder
        vae, dit = _configs(film.folder)
        self.strides = vae.strides
        self.both = dit.image_positions is not None
        self.tokenizer = PromptTokenizer(film.folder.tokenizer, dit.text_len)
        self.warnings: dict[str, None] = {}
        self.same = {
            "address": ADDRESS_VERSION, "vidgen": __version__, "suffix": film.suffix,
            "model": film.folder.content_hash, **film.loading}
        self._settled: set[Any] = set()
        self._picture_hash, self._lora_hashes = cache(_picture_hash), cache(hashes_of)
        if "reference" not in film.folder.tasks:
            kinds = (film.script.characters, film.script.places)
            if any(each.reference for kind in kinds for each in kind.values()):
                self.warnings[f"model {film.folder.name!r} takes no references; characters are "
                              "kept by their words and seeds alone"] = None

    def plan(self, shot: Shot) -> ShotPlan:
        """Plan a shot after those that it needs."""
        total = self._num_frames(shot)
        lengths = self._parts(shot, total)
        before = self.film.shots[shot.continue_from].num_frames if shot.continue_from else 0
        seconds = float((before + total) / self.film.fps)
        if seconds > LONGEST_S:
            raise InputError(f"it lasts {seconds:g} s with the shot that it continues; make both "
                             f"together {LONGEST_S} s at most")
        first_seed = self._seed(shot)
        count = 1 if self.film.draft else self.film.script.option(shot, "takes") or 1
        takes = [self._take(shot, first_seed + n, lengths) for n in range(count)]
        key = takes[0].key
        if count > 1:
            key = address_of({"takes": [take.key for take in takes]})
        return ShotPlan(shot, key, total, tuple(takes))

    def _num_frames(self, shot: Shot) -> int:
        defaults, fps, goes_on = self.folder.defaults, self.film.fps, shot.continue_from is not None
        if shot.frames is not None and not goes_on:
            check_num_frames(shot.frames, self.strides)
        count = shot.frames
        seconds = self.film.script.option(shot, "duration")
        if count is None and seconds is None:
            count = defaults.num_frames - goes_on
        if count is None:
            if seconds * fps < 0.5:
                raise InputError(f"duration {seconds:g} s is less than a frame at {fps} fps; the "
                                 f"nearest is {float(1 / fps):.4g} s")
            count = num_frames_for_seconds(seconds, float(fps), self.strides)[1]
        if count < 1:
            raise InputError(f"frames is {count}; give 1 or more")
        longest = defaults.max_frames
        if count > longest and "extend" not in self.folder.tasks:
            raise InputError(f"{count} frames are more than {self.folder.name!r} makes at once; "
                             f"the nearest is a duration of {float(longest / fps):.4g} s")
        return count

    def _parts(self, shot: Shot, total: int) -> list[int]:
        """Return the number of frames under each of a shot's prompts."""
        goes_on = len(shot.prompt) > 1 or shot.continue_from is not None
        if goes_on and "extend" not in self.folder.tasks:
            key = "continue_from" if shot.continue_from is not None else "several prompts"
            raise InputError(f"{key}: model {self.folder.name!r} can't continue latents; give "
                             "first_frame: {shot: ID} instead, or take one of "
                             f"{', '.join(models_with('extend'))}")
        starts = [math.floor(each.at * self.film.fps + Fraction(1, 2)) for each in shot.prompt]
        ends = [*starts[1:], total]
        for each, start, end in zip(shot.prompt, starts, ends, strict=True):
            if start >= end:
                latest = float((total - 1) / self.film.fps)
                raise InputError(f"the prompt at {each.at:g} s has no frame of its own; the shot "
                                 f"lasts {float(total / self.film.fps):.4g} s, so give times up "
                                 f"to {latest:.4g}, at least a frame from each other")
        return [end - start for start, end in zip(starts, ends, strict=True)]

    def _seed(self, shot: Shot) -> int:
        script = self.film.script
        if shot.seed is not None:
            return shot.seed
        for name in script.cast(shot):
            if name in script.characters and (seed := script.characters[name].seed) is not None:
                return seed
        drawn = hashlib.sha256(f"{script.project.seed} {shot.id}".encode()).hexdigest()
        return int(drawn[:8], 16) >> 1

    def _take(self, shot: Shot, seed: int, lengths: list[int]) -> Take:
        parts: list[Part] = []
        for index, num_frames in enumerate(lengths):
            request = self.film.request(shot, seed, index, num_frames)
            self._check(shot, request, index, num_frames)
            before = parts[-1].key if parts else None
            if not parts and shot.continue_from is not None:
                before = f"shot {self.film.shots[shot.continue_from].key}"
            facts = {
                **self.same, "prompt": request.prompt, "request": asked_options(request),
                "inputs": self._inputs(request),
                "loras": [[self._lora_hashes(choice.path), choice.weight, choice.expert]
                          for choice in map(parse_option, request.lora)],
                "before": before, "shown": self._shown(shot, index)}
            parts.append(Part(address_of(facts), request.prompt, num_frames))
        return Take(seed, tuple(parts))

    def _check(self, shot: Shot, request: Request, index: int, num_frames: int) -> None:
        stand_ins: dict[str, Any] = {}
        for name, key in (("image", "first_frame"), ("last_image", "last_frame")):
            if isinstance(getattr(shot, key), ShotFrame):
                stand_ins[name] = "-"
        if index or shot.continue_from is not None:
            stand_ins["prefix"] = "-"
        check_tasks(request.replace(**stand_ins), self.folder.name, self.folder.tasks,
                    both=self.both)
        shape = (num_frames, request.steps, request.guidance, request.sampler, request.shift)
        if shape not in self._settled:
            make_plan(request, self.folder)
            self._settled.add(shape)
        for text in (request.prompt, request.negative or ""):
            require_short(f"text {text!r}, with descriptions and style,", text, self.tokenizer)

    def _inputs(self, request: Request) -> list[list[str]]:
        named = [("image", request.image), ("last_image", request.last_image)]
        named += [("reference", picture) for picture in request.reference]
        return [[option, self._picture_hash(file)] for option, file in named if file is not None]

    def _shown(self, shot: Shot, index: int) -> list[list[str]]:
        pairs = ((shot.first_frame, 0), (shot.last_frame, len(shot.prompt) - 1))
        return [[str(n), self.film.shots[each.shot].key, each.frame]
                for n, (each, part) in enumerate(pairs)
                if isinstance(each, ShotFrame) and index == part]


def _picture_hash(file: str) -> str:
    check_image(file)
    return sha256_file(file)


def _draft_size(folder: ModelFolder, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size that the model knows of about this aspect, else half of it."""
    width, height = size
    aspect = math.log(width / height)
    fits = [(w, h) for w, h in folder.defaults.sizes
            if abs(math.log(w / h) - aspect) <= DRAFT_ASPECT and w * h <= width * height]
    if fits:
        return min(fits, key=lambda each: each[0] * each[1])
    vae, dit = _configs(folder)
    side = vae.strides.hw * dit.patch_size
    return nearest_sizes(width // 2, side)[0], nearest_sizes(height // 2, side)[0]


def _configs(folder: ModelFolder) -> tuple[Any, Any]:
    """Return the configs of the VAE and of the transformer."""
    return folder.components["vae"].config, folder.components["transformer"].config
