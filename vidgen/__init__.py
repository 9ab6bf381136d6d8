"""vidgen: from a sentence to a clip.

    import vidgen
    engine = vidgen.load("toybox")
    clip = engine.generate("a red car bounces across the desert", seconds=3, seed=7)
    clip.save("car.mp4")

Importing this package loads neither torch nor numpy; the names below load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.pipeline.engine import load
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.story.script import Script

__version__ = "0.1.0"
__all__ = ["Clip", "Journal", "Request", "Script", "__version__", "load"]

_HOMES = {
    "Clip": "vidgen.media.clip",
    "Journal": "vidgen.pipeline.journal.journal",
    "Request": "vidgen.core.request",
    "Script": "vidgen.story.script",
    "load": "vidgen.pipeline.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vidgen' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
