"""Encoders of a picture by their usual names, and the files that can hold what they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidgen.core.errors import InputError, nearest
from vidgen.media.types import PictureSettings
from vidgen.media.write import CONTAINERS


@dataclass(frozen=True)
class Codec:
    """How a codec encodes, and the suffixes of files that hold it."""

    picture: PictureSettings
    suffixes: tuple[str, ...]


# One frame thread and no look-back at other encoders: the bits then follow from the frames alone.
_X265 = {"crf": "18", "preset": "medium",
         "x265-params": "frame-threads=1:open-gop=0:info=0:log-level=error"}
CODECS = {
    "h264": Codec(CONTAINERS[".mp4"].picture, (".mp4", ".mov", ".mkv")),
    "h265": Codec(PictureSettings("libx265", "yuv420p", _X265), (".mp4", ".mov", ".mkv")),
    "vp9": Codec(CONTAINERS[".webm"].picture, (".webm", ".mp4", ".mkv")),
    "prores": Codec(
        PictureSettings("prores_ks", "yuv422p10le", {"profile": "hq"}), (".mov", ".mkv")
    ),
    "ffv1": Codec(CONTAINERS[".mkv"].picture, (".mkv",)),
}


def picture_settings(name: str | None, output: str | Path) -> PictureSettings:
    """How to encode a picture into a file.

    Args:
        name: of a codec; None is the one that the file's kind has by default.
        output: the file, by its suffix.

    Raises:
        InputError: an unknown codec, or a kind of file that can't hold it.
    """
    suffix = Path(output).suffix.lower()
    if name is None:
        return CONTAINERS[suffix].picture
    if name not in CODECS:
        raise InputError(f"codec {name!r} is unknown; {nearest(name, CODECS)}")
    codec = CODECS[name]
    if suffix not in codec.suffixes:
        raise InputError(f"output {output} can't hold codec {name!r}; give a name that ends in "
                         f"{', '.join(codec.suffixes)}, or another codec")
    return codec.picture
