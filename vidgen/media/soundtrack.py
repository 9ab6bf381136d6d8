"""A clip's sound into a container: mastered, encoded and muxed as its picture advances.

Axes: N samples, c channels.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from vidgen.media.mastering import CEILING_DB, Mastering, master, mastered, measure
from vidgen.media.sound import resampled, sound_frame

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer

    from vidgen.media.types import ClipInfo, Samples

_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_BITS = {"aac": 128_000, "libopus": 96_000}
"""Bits a second of each channel."""


class SoundTrack:
    """The sound of a clip on its way into a file, exactly as long as the picture.

    What is longer is cut, what is shorter goes on in silence.

    Args:
        info: of the clip, which has sound.
        codec: libav's name of the encoder.
    """

    def __init__(self, info: ClipInfo, codec: str) -> None:
        assert info.sound is not None
        self.samples: Samples = info.sound
        self.rate, self.codec = info.sound_rate, codec
        known = (48_000,) if codec == "libopus" else _AAC_RATES
        self.target = self.rate if self.rate in known else 48_000
        self.seconds = info.num_frames / info.fps
        self._made, self._facts = Mastering(), {}
        if info.loudness is not None:
            found = measure(self.samples, self.rate)
            self._made = master(found, info.loudness)
            self._facts = {
                "measured_lufs": found.lufs, "measured_peak_db": round(found.peak_db, 3),
                "target_lufs": info.loudness, "ceiling_db": CEILING_DB, **asdict(self._made),
            }

    def facts(self) -> dict[str, Any]:
        """How it is encoded, for the recipe."""
        return {"codec": self.codec, "rate": self.target, "channels": self.samples.shape[1],
                "bits_per_s": self._bits, **self._facts}

    @property
    def _bits(self) -> int:
        return _BITS[self.codec] * int(self.samples.shape[1])

    def begin(self, container: OutputContainer) -> None:
        """Declare the stream, before anything is muxed."""
        layout = "mono" if self.samples.shape[1] == 1 else "stereo"
        stream = container.add_stream(self.codec, rate=self.target, layout=layout)
        self._container, self._stream = container, cast("AudioStream", stream)
        self._stream.bit_rate = self._bits
        own = mastered(self.samples, self.rate, self._made, round(self.seconds * self.rate))
        self._blocks = resampled(own, self.samples.shape[1], self.rate, self.target)
        self._position, self._length = 0, round(self.seconds * self.target)

    def advance(self, seconds: float) -> None:
        """Encode what sounds before `seconds`."""
        while self._position < min(self._length, seconds * self.target):
            block = next(self._blocks, None)
            if block is None:
                return
            block = block[: self._length - self._position]
            frame = sound_frame(block, self.target, self._position)
            self._position += len(block)
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Encode the rest."""
        self.advance(float("inf"))
        self._container.mux(self._stream.encode(None))
