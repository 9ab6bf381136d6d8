"""A clip into a pipe while it is made, for a player that shows it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import BinaryIO

import av
from av.video.reformatter import VideoReformatter

from vidgen.media.encode import to_picture
from vidgen.media.provenance import stamped
from vidgen.media.types import ClipInfo, Frames, PictureSettings
from vidgen.media.write import begin_stream

_PICTURE = PictureSettings(
    "libx264", "yuv420p", {"crf": "16", "preset": "veryfast", "tune": "zerolatency"}, threads=1
)
_MUXER = {"live": "1", "flush_packets": "1", "cluster_time_limit": "200"}


def write_live(
    out: BinaryIO, chunks: Iterable[Frames], info: ClipInfo,
    on_frames: Callable[[int], None] | None = None,
) -> int:
    """Write pictures as Matroska with H.264, each as soon as it is there, marks and recipe first.

    Args:
        out: a pipe; it isn't closed.
        chunks: uint8 [t, H, W, 3] each.
        info: the clip's rate, size and recipe; its sound is left out.
        on_frames: called with the number of frames written so far.

    Returns:
        Frames written: fewer than came where the reader left.
    """
    picture, count, pipe = _PICTURE.fitting(info.size), 0, _Pipe(out)
    reformatter = VideoReformatter()
    with av.open(pipe, "w", format="matroska", options=dict(_MUXER)) as container:
        recipe = None if info.recipe is None else stamped(info.recipe)
        stream = begin_stream(container, picture, replace(info, recipe=recipe))
        for chunk in chunks:
            for frame in chunk:
                image = to_picture(frame, picture.pix_fmt, reformatter)
                image.pts, image.time_base = count, 1 / info.fps
                container.mux(stream.encode(image))
                count += 1
            if on_frames:
                on_frames(count)
            if pipe.is_left:
                break
        container.mux(stream.encode())
    return count


class _Pipe:
    """A pipe that libav may go on writing to when its reader has left."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self.is_left = out, False

    def write(self, data: bytes) -> int:
        """Hand all of it over at once, while there is a reader."""
        if not self.is_left:
            try:
                self._out.write(data)
                self._out.flush()
            except BrokenPipeError:
                self.is_left = True
        return len(data)
