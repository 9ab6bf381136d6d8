"""From a config to items: folders scanned, files looked at, every file's fate settled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vidgen.core.protocols import OnEvent
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.training.data.config import DataConfig, Geometry
from vidgen.training.data.files import Scan, scan
from vidgen.training.data.probe import FileFacts
from vidgen.training.data.records import look_at
from vidgen.training.data.select import Selection, select

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder


@dataclass(frozen=True)
class Survey:
    """All that is known of a config's data.

    Attributes:
        found: the files.
        facts: by SHA-256 of content.
        selection: their fates and items.
    """

    found: Scan
    facts: dict[str, FileFacts]
    selection: Selection


def survey(
    config: DataConfig, folder: ModelFolder, on_event: OnEvent, *, workers: int = 1
) -> Survey:
    """Look at all files of a config, for a model.

    Raises:
        InputError: folders or tables that can't be read, sizes that the model can't have.
    """
    geometry = Geometry.of(config, folder)
    found = scan(config)
    hashes, facts = look_at(found.files, on_event, workers=workers)
    selection = select(config, geometry, found, hashes, facts)
    _note_captions(selection, folder)
    return Survey(found, facts, selection)


def _note_captions(selection: Selection, folder: ModelFolder) -> None:
    """Tell of captions that the text encoder can't read whole, and of words new to it."""
    limit = folder.components["transformer"].config.text_len
    tokenizer = PromptTokenizer(folder.tokenizer, limit)
    for fate in selection.fates:
        for caption in fate.items[0].captions if fate.items else ():
            count = tokenizer.count(caption)
            if count > limit:
                fate.notes.append(
                    f"its caption has {count} tokens, the model reads {limit}: the last "
                    f"{count - limit} are cut"
                )
            unknown = [word for word, _ in tokenizer.unknown_words(caption)]
            if unknown:
                fate.notes.append(f"the model doesn't know: {', '.join(unknown[:8])}")
