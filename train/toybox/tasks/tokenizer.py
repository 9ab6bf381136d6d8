"""Train a tokenizer on captions and write it as a folder that transformers reads as well."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_write
from vidgen.models.tokenizer import EOS, PAD
from vidgen.models.words import split_words

NUM_SUBJECTS = 64
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SUBJECTS = [f"<subject_{index}>" for index in range(NUM_SUBJECTS)]
SPACE = "▁"


def train_tokenizer(captions: Iterable[str], folder: Path | str, vocab_size: int = 2048) -> int:
    """Learn byte-pair merges (Sennrich et al. 2016) from captions and write a tokenizer folder.

    Ids: 0 padding, 1 end of text, then 64 `<subject_n>` for subjects learned later, 256 bytes that
    spell whatever the captions lack, and what was learned. Lowercasing and NFKC are part of
    `tokenizer.json`, so every reader of the folder does the same.

    Args:
        captions: what to learn from; also the source of `words.txt`.
        folder: written to: `tokenizer.json`, `tokenizer_config.json`, `words.txt`.
        vocab_size: most tokens, all kinds together.

    Returns:
        Tokens in the vocabulary.

    Raises:
        InputError: a vocabulary too small for the fixed tokens.
    """
    fixed = [PAD, EOS, *SUBJECTS, *BYTES]
    if vocab_size <= len(fixed):
        raise InputError(f"a vocabulary of {vocab_size} can't hold the {len(fixed)} fixed tokens")
    captions = list(captions)
    learner = _pipeline(BPE())
    trainer = BpeTrainer(vocab_size=vocab_size - len(fixed), show_progress=False)
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {token: index for index, token in enumerate([*fixed, *tokens])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = _pipeline(BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, EOS)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, lstrip=True) for token in SUBJECTS])
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocab[EOS])]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "padding_side": "right",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    words = sorted({word for caption in captions for word in split_words(caption)})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=1).encode())
    atomic_write(folder / "words.txt", "".join(f"{word}\n" for word in words).encode())
    return len(vocab)


def _pipeline(model: BPE) -> Tokenizer:
    """Normaliser, splitting and decoder; words carry the space before them, marks stand alone."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(SPACE, "first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
