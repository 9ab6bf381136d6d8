"""`vidgen eval toybox`: does a model show what the sentence says? Scored by the judge.

Sources of clips, all of the same benchmark scenes (`captions.prompts`):
    text        generated from the caption
    held_out    the same for (sprite, motion, place) triples never trained on
    image       generated from the caption and the rendered first frame
    render      rendered: what the judge makes of perfection
    render_end  rendered, scored as `image` is
    vae         rendered and passed through the VAE: the best that a generator behind it can reach
    reserved    likewise with sprites that no training saw
Each clip's scores are a line of `<output>.jsonl`, addressed by all that shaped them; a run that was
killed finds them there and goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.runtime import fingerprint
from vidgen.evaluation.generation import generate_batch, round_trip
from vidgen.evaluation.judging import answers, grade, judge_renders
from vidgen.evaluation.score_log import ScoreLog
from vidgen.media.quality import psnr
from vidgen.media.sheet import contact_sheet
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.video import Engine, load, to_frames
from vidgen.toybox.captions import caption, prompts
from vidgen.toybox.judge import Judge, JudgeFolder, embedded_judge
from vidgen.toybox.render import Rendered, render
from vidgen.toybox.scenes import (
    MOTIONS,
    PLACES,
    RESERVED_SPRITES,
    SEED_RANGES,
    WORLD_VERSION,
    Scene,
    compose_scene,
    is_valid,
)

Suite = Literal["all", "text", "image", "vae", "judge"]
OnEvent = Callable[[dict[str, Any]], None]
SOURCES: dict[Suite, tuple[str, ...]] = {
    "text": ("render", "vae", "text", "held_out"),
    "image": ("render_end", "image"),
    "vae": ("vae", "reserved"),
    "judge": ("render",),
    "all": ("render", "vae", "reserved", "text", "held_out", "render_end", "image"),
}
SHEET_CLIPS, SHEET_FRAMES = 16, 6
SHORTEST_MOTION = 5
JUDGE_SEEDS = 1 << 24  # from the end of the judge's range: scenes it never learned from


@dataclass(frozen=True)
class Benchmark:
    """What to score, and how the clips are made.

    Args:
        model: name or folder.
        split: "dev" for choosing, "test" once for a release.
        prompts: of text to video.
        held_out: prompts of triples never trained on.
        images: first frames of image to video.
        reserved: clips of reserved sprites.
        suite: which part to run.
        seed: of the first clip; the others follow.
        batch: clips made at once.
        steps: and the following, None: the model's own.
        judge: folder of another judge than the embedded one.
    """

    model: str = "toybox"
    split: Literal["dev", "test"] = "dev"
    prompts: int = 300
    held_out: int = 100
    images: int = 200
    reserved: int = 60
    suite: Suite = "all"
    seed: int = 0
    batch: int = 8
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    frames: int | None = None
    size: str | None = None
    dtype: str | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "held_out", "images", "reserved"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.batch < 1 or self.prompts < 1:
            raise InputError("prompts and batch must be at least 1")


@dataclass(frozen=True)
class Item:
    """One clip to be scored."""

    source: str
    index: int
    scene: Scene
    prompt: str
    seed: int


class ToyboxRun:
    """A benchmark on its way: makes clips, has them judged, remembers."""

    def __init__(self, bench: Benchmark, output: Path, on_event: OnEvent) -> None:
        self.bench, self.tell = bench, on_event
        self.engine: Engine = load(bench.model, dtype=bench.dtype)
        self.judge_folder = JudgeFolder(Path(bench.judge)) if bench.judge else embedded_judge()
        self.judge: Judge = self.judge_folder.load(self.engine.device)
        self.plan = self._plan()
        self.identity = self._identity()
        self.log = ScoreLog(output.with_name(output.name + ".jsonl"))
        self.sheet: dict[int, list[Any]] = {}
        drawn = [name for name in SOURCES[bench.suite] if name in ("text", "image")]
        self.sheet_source = drawn[0] if drawn else None

    def _plan(self) -> Plan:
        bench = self.bench
        names = ("steps", "guidance", "shift", "sampler", "frames", "size")
        options = {name: getattr(bench, name) for name in names}
        request = Request.of(prompts(bench.split, 1)[0][1], {"seed": bench.seed, **options})
        plan = self.engine.plan(request, Inputs())
        if "image" in SOURCES[bench.suite] and plan.num_frames < SHORTEST_MOTION:
            raise InputError(f"frames is {plan.num_frames}, too few to see a clip go on from its "
                             f"first frame; give {SHORTEST_MOTION} or more, or another --suite")
        return plan

    def _identity(self) -> dict[str, Any]:
        plan = asdict(self.plan)
        kept = ("negative", "width", "height", "num_frames", "num_steps", "shift", "sampler",
                "guidance")  # fmt: skip
        return {
            "world_version": WORLD_VERSION,
            "model": {"name": self.engine.folder.name, "sha256": self.engine.folder.content_hash},
            "judge": self.judge_folder.sha256,
            "split": self.bench.split,
            "settings": {name: plan[name] for name in kept} | {"fps": str(self.plan.fps)},
            "dtype": self.engine.dtype,
            "batch": self.bench.batch,
        }

    def key(self, item: Item) -> str:
        """SHA-256 of all that shapes an item's scores."""
        address = json.dumps([self.identity, asdict(item)], sort_keys=True)
        return hashlib.sha256(address.encode()).hexdigest()

    def score(self, source: str, *, sheet: bool = False) -> list[dict[str, Any]]:
        """The scores of every item of a source, in order; makes those that are missing.

        Clips are made in the same batches in every run, so resuming changes nothing.
        """
        items = self.items(source)
        start, made = time.monotonic(), 0
        wanted = sheet and source == self.sheet_source
        for first in range(0, len(items), self.bench.batch):
            part = items[first : first + self.bench.batch]
            shown = wanted and first < SHEET_CLIPS
            if shown or any(self.key(item) not in self.log.scores for item in part):
                scores = self._score_batch(source, part, keep=shown)
                self.log.add((self.key(item), row) for item, row in zip(part, scores, strict=True))
                made += len(part)
            done = first + len(part)
            left = (time.monotonic() - start) / max(1, made) * (len(items) - done)
            self.tell({"event": "progress", "stage": source, "done": done, "total": len(items),
                       "seconds_left": round(left)})  # fmt: skip
        return [self.log.scores[self.key(item)] for item in items]

    def items(self, source: str) -> list[Item]:
        """The clips of a source."""
        bench = self.bench
        pairs: list[tuple[Scene, str]]
        if source in ("image", "render_end"):  # a car that drives past is gone at the end
            pool = prompts(bench.split, 2 * bench.images)
            pairs = [p for p in pool if p[0].actors[0].motion != "drives past"][: bench.images]
        elif source == "reserved":
            scenes = reserved_scenes(bench.split, bench.reserved)
            pairs = [(scene, caption(scene, seed=0, detail="full")) for scene in scenes]
        elif source == "held_out":
            pairs = prompts(bench.split, bench.held_out, held_out=True)
        else:
            pairs = prompts(bench.split, bench.prompts)
        return [Item(source, i, *pair, bench.seed + i) for i, pair in enumerate(pairs)]

    def _score_batch(
        self, source: str, items: Sequence[Item], *, keep: bool = False
    ) -> list[dict[str, Any]]:
        scenes = [item.scene for item in items]
        texts, seeds = [item.prompt for item in items], [item.seed for item in items]
        if source in ("text", "held_out"):
            video = generate_batch(self.engine, self.plan, texts, seeds)
            if keep:
                self._keep_for_sheet(items, video)
            return self._judged(video, scenes)
        shown = self._render(scenes, [0] if source == "image" else None)
        if source == "image":
            video = generate_batch(self.engine, self.plan, texts, seeds, shown.video)
            if keep:
                self._keep_for_sheet(items, video)
            return self._judged(video, scenes, ends=True)
        if source in ("render", "render_end"):
            return self._judged(shown.video, scenes, ends=source == "render_end")
        decoded = round_trip(self.engine, shown.video)
        mask = shown.masks.amax(1, keepdim=True)
        whole, inside = psnr(decoded, shown.video), psnr(decoded, shown.video, mask)
        rows = self._judged(decoded, scenes)
        for row, ratio, ratio_inside in zip(rows, whole.tolist(), inside.tolist(), strict=True):
            row |= {"psnr": ratio, "mask_psnr": ratio_inside}
        return rows

    def _render(self, scenes: Sequence[Scene], frames: Sequence[int] | None = None) -> Rendered:
        plan = self.plan
        size = (plan.num_frames, plan.height, plan.width, float(plan.fps))
        return render(scenes, *size, frames=frames)

    def _judged(
        self, video: Tensor, scenes: Sequence[Scene], *, ends: bool = False
    ) -> list[dict[str, Any]]:
        """Score video [B, 3, T, H, W]; with `ends` also its last sprite and its first jump."""
        here = video.to(self.engine.device)
        rows = []
        for scene, verdict in zip(scenes, self.judge.verdicts(here), strict=True):
            rows.append({"right": grade(verdict, scene), "answers": answers(verdict)})
        if ends:
            lasts = self.judge.verdicts(here[:, :, -1:])
            for row, last, scene, jump in zip(rows, lasts, scenes, first_jump(video), strict=True):
                row["right"]["last_sprite"] = last.shows([a.sprite for a in scene.actors])
                row["answers"]["last_sprite"] = last.sprite
                row["jump"] = jump
        return rows

    def _keep_for_sheet(self, items: Sequence[Item], video: Tensor) -> None:
        moments = torch.linspace(0, video.shape[2] - 1, SHEET_FRAMES).round().long()
        for item, clip in zip(items, video, strict=True):
            self.sheet[item.index] = [frame.numpy() for frame in to_frames(clip[:, moments])]

    def save_sheet(self, path: Path) -> None:
        """Write the first clips, several frames each, one clip a row, under their prompts."""
        assert self.sheet_source is not None
        texts = [item.prompt for item in self.items(self.sheet_source)]
        frames = [frame for index in sorted(self.sheet) for frame in self.sheet[index]]
        labels = [text for i in sorted(self.sheet) for text in _split(texts[i], SHEET_FRAMES)]
        contact_sheet(frames, path, columns=SHEET_FRAMES, labels=labels)


def _split(text: str, parts: int) -> list[str]:
    """A sentence in pieces of about equal length, for the labels of a row."""
    words, width = text.split(), len(text) / parts
    lines = [""] * parts
    for word in words:
        at = min(parts - 1, int(sum(len(line) + 1 for line in lines if line) / (width + 1)))
        lines[at] = f"{lines[at]} {word}".strip()
    return lines


def reserved_scenes(split: str, count: int) -> list[Scene]:
    """Scenes of the reserved sprites in all motions and places."""
    first = SEED_RANGES[split][0] + (1 << 36)
    pairs = [(s, m) for m in MOTIONS for s in RESERVED_SPRITES if is_valid(s, m)]
    return [
        compose_scene(first + i, *pairs[i % len(pairs)], PLACES[i % len(PLACES)])
        for i in range(count)
    ]


def first_jump(video: Tensor) -> list[float]:
    """How much the first step of each clip [B, 3, T, H, W] exceeds its usual step.

    |f1 - f0| / median over k >= 1 of |f(k+1) - f(k)|, each a mean over pixels. A first frame that
    was given and not taken up shows as a jump.
    """
    steps = video.float().diff(dim=2).abs().mean((1, 3, 4))
    usual = steps[:, 1:].median(dim=1).values.clamp(min=1e-6)
    return [float(ratio) for ratio in steps[:, 0] / usual]


def run_toybox(
    bench: Benchmark, output: str | Path, on_event: OnEvent, sheet: str | Path | None = None
) -> dict[str, Any]:
    """Score a model; see the module's words and `summary.summarise` for what comes back.

    Raises:
        ModelError: no such model or judge.
        InputError: a setting that can't be honoured.
    """
    from vidgen.evaluation.summary import summarise

    run = ToyboxRun(bench, Path(output), on_event)
    if sheet is not None and run.sheet_source is None:
        raise InputError(f"--sheet draws generated clips, and suite {bench.suite!r} makes none; "
                         "leave it out")
    scores = {
        source: run.score(source, sheet=sheet is not None) for source in SOURCES[bench.suite]
    }
    items = {source: run.items(source) for source in scores}
    trust = None
    if bench.suite in ("all", "judge"):
        first = SEED_RANGES["judge"][1] - JUDGE_SEEDS
        trust = judge_renders(run.judge, first, bench.prompts)
    if sheet is not None:
        run.save_sheet(Path(sheet))
    return {
        "suite": "toybox", "part": bench.suite, **run.identity,
        "seeds": [bench.seed, bench.seed + bench.prompts - 1], "machine": fingerprint(),
        **summarise(scores, {name: [i.scene for i in part] for name, part in items.items()}, trust),
    }
