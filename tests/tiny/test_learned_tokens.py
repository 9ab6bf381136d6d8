"""Embeddings that an adapter brings for spare tokens: in files, in prompts, in generations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.lora_models import TINY, make_adapter, make_dit
from vidgen.core.errors import ModelError
from vidgen.models.lora import Adapter
from vidgen.models.presets import TEXT_PRESETS
from vidgen.models.text import TextEncoder, UMT5Encoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.engine import load
from vidgen.weights.lora import read_lora, write_lora
from vidgen.weights.lora_dialects import DIALECTS

TOKEN, OTHER = "<subject_3>", "<subject_4>"
PROMPT = f"a {TOKEN} bounces across the desert"


@pytest.fixture(scope="module")
def row() -> torch.Tensor:
    return torch.linspace(-1, 1, TEXT_PRESETS["tiny"].hidden_dim)


@pytest.fixture
def encoder(tiny_model) -> TextEncoder:
    torch.manual_seed(1)
    return TextEncoder(UMT5Encoder(TEXT_PRESETS["tiny"]), PromptTokenizer(tiny_model / "tokenizer"))


def test_a_learned_token_equals_an_encoder_whose_embedding_it_is(encoder, row):
    told, _ = encoder.encode([PROMPT, "a cat"], {TOKEN: row})
    plain, _ = encoder.encode([PROMPT, "a cat"])
    index = encoder.tokenizer.token_id(TOKEN)
    encoder.encoder.shared.weight.data[index] = row
    expected, _ = encoder.encode([PROMPT, "a cat"])
    assert torch.equal(told, expected)
    assert not torch.equal(told[0], plain[0])
    assert torch.equal(told[1], plain[1])


def test_a_token_of_another_model_is_refused(encoder, row):
    with pytest.raises(ModelError, match="no token '<subject_99>'"):
        encoder.encode([PROMPT], {"<subject_99>": row})
    with pytest.raises(ModelError, match=r"has shape \[5\], but this text encoder needs \[16\]"):
        encoder.encode([PROMPT], {TOKEN: row[:5]})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tokens_lie_in_files_of_every_dialect(dialect, row, tmp_path, caplog):
    adapter = replace(make_adapter(make_dit()), tokens={TOKEN: row, OTHER: -row})
    # a patch embedding's factors have no name in all dialects' tools, but in all of these
    write_lora(adapter, tmp_path / "lora.safetensors", dialect)
    read = read_lora(tmp_path / "lora.safetensors", TINY)
    assert read.tokens.keys() == {TOKEN, OTHER}
    assert torch.equal(read.tokens[TOKEN], row)
    assert read.low_rank.keys() == adapter.low_rank.keys()
    assert not caplog.records


def test_a_damaged_embedding_is_refused(row, tmp_path):
    adapter = Adapter("a", {}, tokens={TOKEN: row * torch.nan})
    write_lora(adapter, tmp_path / "lora.safetensors", "vidgen")
    with pytest.raises(ModelError, match="embeddings of <subject_3> aren't finite vectors"):
        read_lora(tmp_path / "lora.safetensors", TINY)


def test_generations_read_their_adapters_tokens_alone(tiny_model, row, tmp_path):
    path = tmp_path / "token.safetensors"
    write_lora(Adapter("token", {}, tokens={TOKEN: row}), path, "vidgen")
    engine = load(str(tiny_model), device="cpu", dtype="fp32")

    def frames(prompt: str, **options) -> np.ndarray:
        return engine.generate(prompt, seed=1, frames=5, steps=1, **options).frames

    plain = frames(PROMPT)
    assert not np.array_equal(frames(PROMPT, lora=[str(path)]), plain)
    assert np.array_equal(frames("a cat", lora=[str(path)]), frames("a cat"))
    assert np.array_equal(frames(PROMPT), plain)
