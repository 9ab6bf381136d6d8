"""A clip's sound, settled before the clip is generated, so that a mistake in it costs no time."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vidgen.core.errors import InputError
from vidgen.core.request import NO_AUDIO, OWN_AUDIO, Request
from vidgen.media.mastering import TARGET_LUFS
from vidgen.media.mix import DUCK_DB, DUCK_DOWN_S, DUCK_UP_S, at_length, fit_sound, lay_over
from vidgen.media.sound import RATE, read_sound
from vidgen.media.speech import Speech, speak

if TYPE_CHECKING:
    from fractions import Fraction

    from vidgen.media.clip import Clip
    from vidgen.media.types import Samples
    from vidgen.pipeline.diffusers_backend.pipe import OnProgress
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.sound.audio_model import AudioModel
    from vidgen.pipeline.types import Opened

log = logging.getLogger(__name__)

Source = Literal["none", "own", "file", "prefix", "model"]


@dataclass(frozen=True)
class Soundtrack:
    """A clip's settled sound."""

    source: Source  # of the sound that speech is mixed over
    num_samples: int  # length of the clip at `RATE`
    bed: Samples | None = None  # a file's sound at `RATE`, as long as the clip
    loop: bool = False  # repeat sound that is shorter than the clip
    speech: Speech | None = None
    model: AudioModel | None = None  # generates the sound, for source "model"
    is_own: bool = False  # the clip's model generates it after the picture

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe's entry `sound`, if any."""
        facts: dict[str, Any] = {} if self.source == "own" else {"source": self.source}
        if self.source in ("file", "model"):
            facts["loop"] = self.loop
        if self.model is not None:
            facts["model"] = self.model.facts()
        if self.speech is not None:
            facts["speech"] = {
                "voice": self.speech.voice,
                "sentences": [asdict(sentence) for sentence in self.speech.sentences],
                "duck_db": DUCK_DB, "duck_down_s": DUCK_DOWN_S, "duck_up_s": DUCK_UP_S,
            }
        return {"sound": facts} if facts else {}

    def under(
        self, clip: Clip, seed: int, on_step: OnProgress, journal: Journal | None = None
    ) -> Clip:
        """Return the clip with its sound, if any.

        Another model that generates the sound gets `seed` and reports its steps to `on_step`; it
        may raise InputError for refused arguments, or ModelError.
        """
        if self.source == "own" and self.speech is None:  # keeps its own rate
            clip.info = replace(clip.info, loudness=TARGET_LUFS)
            return clip
        sound = self._bed(clip, seed, on_step, journal)
        loudness = None if self.source == "prefix" else TARGET_LUFS  # a prefix keeps its level
        if self.speech is not None:
            spans = [(each.start_s, each.end_s) for each in self.speech.sentences]
            sound, loudness = lay_over(sound, self.speech.samples, spans), TARGET_LUFS
        clip.info = replace(clip.info, sound=sound, sound_rate=RATE, loudness=loudness)
        return clip

    def _bed(
        self, clip: Clip, seed: int, on_step: OnProgress, journal: Journal | None
    ) -> Samples | None:
        """Return the sound under the speech, at `RATE` and as long as the clip."""
        if self.model is not None:
            made = journal.kept_sound() if journal else None
            if made is None:
                made = self.model.make(seed, on_step)
                if journal:
                    journal.keep_sound(*made)
            return at_length(*made, self.num_samples, loop=self.loop)
        if self.source == "own" and clip.sound is not None:
            return at_length(clip.sound, clip.sound_rate, self.num_samples)
        return self.bed


def make_soundtrack(
    request: Request, num_frames: int, fps: Fraction, engine: Opened, *, has_sound: bool
) -> Soundtrack:
    """Settle a request's sound: read files, synthesise speech.

    Another model shares the engine's device, dtype and offload. `has_sound` is True if the engine's
    model generates sound itself.

    Raises:
        InputError: no model for the requested sound, an unusable file, or speech that doesn't fit.
        ModelError: the other model doesn't exist or generates no sound.
    """
    num_samples = round(num_frames / fps * RATE)
    if request.audio == OWN_AUDIO and request.audio_model is None and not has_sound:
        raise InputError(f"audio is 'generate', but model {engine.folder.name!r} makes no sound; "
                         "give --audio FILE, --audio-model FOLDER (Stable Audio, AudioLDM 2), "
                         "--say TEXT, or a model that makes it, such as LTX-2")
    source: Source = "own"
    bed = model = None
    if request.audio_model is not None:
        from vidgen.pipeline.sound.audio_model import open_audio_model

        source = "model"
        model = open_audio_model(request.audio_model, request.audio_prompt or request.prompt,
                                 num_samples / RATE, device=engine.device, dtype=engine.dtype,
                                 offload=engine.offload)
    elif request.audio == NO_AUDIO:
        source = "none"
    elif request.audio_file is not None:
        source = "file"
        bed, notes = fit_sound(request.audio_file, num_samples, loop=bool(request.audio_loop))
        for note in notes:
            log.warning("%s", note)
    elif request.prefix is not None and not has_sound and (earlier := read_sound(request.prefix)):
        source, bed = "prefix", at_length(*earlier, num_samples)
    if request.follow_audio and source != "file":
        raise InputError(f"audio is {request.audio!r}; follow_audio needs --audio FILE, a sound to "
                         "follow")
    speech = speak(request.say, request.voice, num_samples) if request.say else None
    return Soundtrack(source, num_samples, bed, bool(request.audio_loop), speech, model,
                      is_own=has_sound and source == "own")
