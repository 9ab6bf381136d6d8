"""A clip's sound: the model's own, a file's, another model's, with speech over it.

All that a request asks for is settled before the clip is made, so that a text that is too long or
a file that can't be used costs nothing.
"""

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
    from vidgen.media.encode import Samples

log = logging.getLogger(__name__)

Source = Literal["none", "own", "file", "prefix"]


@dataclass(frozen=True)
class Soundtrack:
    """What a clip is to sound like.

    Attributes:
        source: of what lies under the speech: nothing, what the clip's model makes, a file, or the
            clip that goes on.
        num_samples: of the clip, at `RATE`.
        bed: a file's sound at `RATE`, as long as the clip.
        loop: whether a file's sound was repeated.
        speech: what is said.
    """

    source: Source
    num_samples: int
    bed: Samples | None = None
    loop: bool = False
    speech: Speech | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe's entries: `sound`, where there is something to tell."""
        told: dict[str, Any] = {} if self.source == "own" else {"source": self.source}
        if self.source == "file":
            told["loop"] = self.loop
        if self.speech is not None:
            told["speech"] = {
                "voice": self.speech.voice,
                "sentences": [asdict(sentence) for sentence in self.speech.sentences],
                "duck_db": DUCK_DB, "duck_down_s": DUCK_DOWN_S, "duck_up_s": DUCK_UP_S,
            }
        return {"sound": told} if told else {}

    def under(self, clip: Clip) -> Clip:
        """The clip with its sound; one that has none, and is given none, stays silent."""
        bed, loudness = self.bed, TARGET_LUFS
        if self.source == "own" and clip.sound is not None:
            bed = at_length(clip.sound, clip.sound_rate, self.num_samples)
        if self.speech is not None:
            spans = [(each.start_s, each.end_s) for each in self.speech.sentences]
            bed = lay_over(bed, self.speech.samples, spans)
        elif self.source == "prefix":
            loudness = None  # it has its level
        clip.info = replace(clip.info, sound=bed, sound_rate=RATE, loudness=loudness)
        return clip


def make_soundtrack(
    request: Request, num_frames: int, fps: Fraction, *, name: str, has_sound: bool
) -> Soundtrack:
    """Settle a request's sound: files are read, texts spoken.

    Args:
        request: for clips of one length.
        num_frames: of each clip.
        fps: exact frame rate.
        name: of the model, for messages.
        has_sound: whether it makes sound of its own.

    Raises:
        InputError: sound from a model that makes none, files that can't be used, speech that
            doesn't fit.
    """
    num_samples = round(num_frames / fps * RATE)
    if request.audio == OWN_AUDIO and request.audio_model is None and not has_sound:
        raise InputError(
            f"audio is 'generate', but model {name!r} makes no sound; give --audio FILE, "
            "--audio-model FOLDER (Stable Audio, AudioLDM 2), --say TEXT, or a model that makes "
            "it, such as LTX-2"
        )
    source: Source = "own"
    bed = None
    if request.audio == NO_AUDIO:
        source = "none"
    elif request.audio_file is not None:
        source = "file"
        bed, notes = fit_sound(request.audio_file, num_samples, loop=bool(request.audio_loop))
        for note in notes:
            log.warning("%s", note)
    elif request.prefix is not None and (earlier := read_sound(request.prefix)):  # type: ignore[arg-type]
        source, bed = "prefix", at_length(*earlier, num_samples)
    speech = speak(request.say, request.voice, num_samples) if request.say else None
    return Soundtrack(source, num_samples, bed, bool(request.audio_loop), speech)
