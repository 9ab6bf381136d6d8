"""What each stage of a generation takes, counted from configs and the files' headers.

See `seconds` and `memory` for the stages, `workload` for the counts, `calibration` for the
machine's rates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidgen.pipeline.budget.job import Job, Rates
from vidgen.pipeline.budget.memory import Memory
from vidgen.pipeline.budget.seconds import BUILDING_S, Seconds
from vidgen.pipeline.budget.stages import Estimate, Setup, Stage
from vidgen.pipeline.types import Plan

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.weights.folder import ModelFolder


def estimate(
    folder: ModelFolder, plan: Plan, request: Request, setup: Setup, *,
    rates: Rates | None = None, suffix: str = ".mp4",
) -> Estimate:
    """What a generation takes, from a model's headers; see `Job` for the arguments."""
    job = Job(folder, plan, request, setup, rates or {}, suffix)
    took, held, count = Seconds(job), Memory(job), request.count
    load_s, load_b, decode_b = _loading(job, took), held.load(), held.decode()
    sound: tuple[Stage, ...] = ()
    if job.makes_sound:
        sound = (Stage("sound", count * (took.sound() + load_s["sound"]), held.sound()),)
    decode_s = took.decode() + load_s["decode"]
    stages = (
        Stage("text", took.text() + load_s["text"], held.text()),
        Stage("prepare", count * (took.prepare() + load_s["prepare"]), held.prepare()),
        Stage("denoise", count * (took.denoise() + load_s["denoise"]), held.denoise()), *sound,
        Stage("decode", count * decode_s, decode_b),
        Stage("mux", count * took.mux(decode_s), decode_b),
    )
    peak = max(load_b, *(stage.bytes for stage in stages))
    load = load_s["load"] + took.fresh(peak)  # once, for all
    return Estimate(
        (Stage("load", load, load_b), *stages), setup,
        encoder_s=count * took.encode_video(), kept_frames=count * job.passes.kept,
        disk_bytes=count * held.disk(), measured=_is_measured(job), notes=_notes(job),
    )


def _loading(job: Job, took: Seconds) -> dict[str, float]:
    """Seconds that networks take to come, by the stage that they come in.

    All come at the beginning, or each when it is used, if they are put away after use.
    """
    each = {role: took.load(role) for role in job.folder.components}
    added = dict.fromkeys(("text", "prepare", "denoise", "sound", "decode"), 0.0)
    if job.setup.offload == "none":
        return added | {"load": BUILDING_S + sum(each.values())}
    num_windows = len(job.passes.windows)
    added |= {"load": BUILDING_S, "text": each["text_encoder"], "decode": each["vae"],
              "denoise": num_windows * sum(each[role] for role in job.experts)}
    if job.passes.encoded:
        added["prepare"] = each["vae"] + each.get("image_encoder", 0.0)
    if job.makes_sound:
        added["sound"] = each["sound_vae"] + each["transformer"] * num_windows
    return added


def _is_measured(job: Job) -> bool:
    return job.rates.measured and job.vae_rates.measured


def _notes(job: Job) -> tuple[str, ...]:
    request, notes = job.request, []
    if request.first_frame_model:
        notes.append("drawing the first frame is not counted")
    if request.lora:
        notes.append("adapters are not counted")
    if request.audio_model:
        notes.append("the sound by --audio-model is not counted")
    if request.cache != "none":
        notes.append(f"up to this: how many steps --cache {request.cache} spares depends on the "
                     "clip")
    if not _is_measured(job):
        notes.append("this machine was not measured: `vidgen plan` does")
    return tuple(notes)
