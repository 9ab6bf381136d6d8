"""Contexts of prompts that an opened model remembers: the same bits, without the text encoder."""

from __future__ import annotations

import pytest
import torch

from tests.models import build_tiny_model
from vidgen.models.text import TextEncoder
from vidgen.pipeline import model
from vidgen.pipeline.engine import Engine, load

TEXTS = ("a red car bounces across the desert", "", "a cat moves left")


@pytest.fixture
def engine(tmp_path) -> Engine:
    return load(str(build_tiny_model(tmp_path / "tiny")), device="cpu", dtype="fp32",
                offload="stage")


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that the encoder reads."""
    asked, encode = [], TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode",
        lambda self, texts, *rest: asked.extend(texts) or encode(self, texts, *rest),
    )
    return asked


def test_a_known_prompt_needs_no_text_encoder_and_gives_the_same_bits(engine, encoded):
    with engine.loader.use("text_encoder") as network:
        expected = TextEncoder(network, engine.tokenizer).encode(TEXTS[:1])
    first = engine.encode_texts(TEXTS[:1])
    encoded.clear()
    again = engine.encode_texts(TEXTS[:1])
    assert not encoded
    for part in (0, 1):
        assert torch.equal(first[part], expected[part])
        assert torch.equal(again[part], expected[part])


def test_only_unknown_prompts_are_encoded(engine, encoded):
    for text in (*TEXTS, *TEXTS):
        engine.encode_texts([text])
    assert encoded == [*TEXTS]


def test_a_second_clip_of_a_prompt_loads_no_text_encoder(engine, monkeypatch):
    first = engine.generate(TEXTS[0], seed=1, steps=2).latents
    real = engine.loader.use

    def use(role):
        assert role != "text_encoder", "the text encoder was loaded"
        return real(role)

    monkeypatch.setattr(engine.loader, "use", use)
    assert torch.equal(engine.generate(TEXTS[0], seed=1, steps=2).latents, first)


def test_what_was_learned_is_not_remembered(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(TextEncoder, "encode", lambda _, _texts, learned: seen.append(learned))
    for value in (0.0, 1.0):
        engine.encode_texts(TEXTS[:1], {"<new>": torch.tensor([value])})
    assert [float(learned["<new>"]) for learned in seen] == [0.0, 1.0]


def test_the_oldest_is_forgotten(engine, encoded, monkeypatch):
    monkeypatch.setattr(model, "REMEMBERED", 2)
    for text in (*TEXTS, TEXTS[1], TEXTS[0]):
        engine.encode_texts([text])
    assert encoded == [*TEXTS, TEXTS[0]]
