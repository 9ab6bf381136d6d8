"""Contexts of prompts on disk: the same as computed, without the text encoder, for as little."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from tests.models import build_tiny_model
from train.toybox.model_files import save_module
from vidgen.models.text import TextConfig, TextEncoder, UMT5Encoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline import prompts
from vidgen.pipeline.loader import ModelLoader
from vidgen.pipeline.prompts import PromptCache, PromptEncoder
from vidgen.weights.configs import encoder_to_transformers
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

CPU = torch.device("cpu")
TEXTS = ("a red car bounces across the desert", "", "a cat  moves left &amp; right")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompts, "WORTHWHILE_BYTES", 1000)
    return tmp_path / "cache" / "vidgen" / "prompts"


@pytest.fixture
def folder(tmp_path) -> ModelFolder:
    return open_model(str(build_tiny_model(tmp_path / "tiny")))


def encoder_of(folder: ModelFolder, dtype=torch.float32, *, length=512) -> PromptEncoder:
    tokenizer = PromptTokenizer(folder.tokenizer, length)
    return PromptEncoder(ModelLoader(folder, CPU, dtype, "stage"), tokenizer)


def forbid_loading(monkeypatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr("vidgen.weights.component.load_module", refuse)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_prompt_needs_no_text_encoder_and_gives_the_same_bits(folder, monkeypatch, dtype):
    expected = []
    with ModelLoader(folder, CPU, dtype).use("text_encoder") as network:
        text = TextEncoder(network, PromptTokenizer(folder.tokenizer))
        expected = [text.encode([prompt]) for prompt in TEXTS]
    first = [encoder_of(folder, dtype).encode([prompt]) for prompt in TEXTS]
    forbid_loading(monkeypatch)
    again = [encoder_of(folder, dtype).encode([prompt]) for prompt in TEXTS]
    for computed, learned, kept in zip(expected, first, again, strict=True):
        for part in (0, 1):
            assert torch.equal(computed[part], learned[part])
            assert torch.equal(computed[part], kept[part])
            assert computed[part].dtype == kept[part].dtype


def test_prompts_together_are_those_alone_with_zero_rows_behind(folder, own_cache):
    context, lengths = encoder_of(folder).encode([*TEXTS, TEXTS[0]])
    assert len(entries(own_cache)) == 3
    assert torch.equal(context[0], context[3])
    for row, length, prompt in zip(context, lengths.tolist(), (*TEXTS, TEXTS[0]), strict=True):
        alone, alone_length = encoder_of(folder).encode([prompt])
        assert alone_length.tolist() == [length] == [alone.shape[1]]
        assert torch.equal(row[:length], alone[0])
        assert not row[length:].any()


def test_only_unknown_prompts_are_encoded(folder, monkeypatch):
    encoder_of(folder).encode(TEXTS[:2])
    asked = []
    encode = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode",
        lambda self, texts, *rest: asked.extend(texts) or encode(self, texts, *rest),
    )
    encoder_of(folder).encode(TEXTS)
    assert asked == [TEXTS[2]]


def test_a_prompt_counts_as_the_encoder_reads_it(folder, own_cache, monkeypatch):
    """Wan cleans white space and HTML entities away before it reads a prompt."""
    encoder_of(folder).encode([TEXTS[2]])
    forbid_loading(monkeypatch)
    encoder_of(folder).encode(["  a cat moves left & right\n"])
    assert len(entries(own_cache)) == 1


def test_whatever_shapes_a_context_makes_it_another(folder, own_cache, tmp_path, monkeypatch):
    def count() -> int:
        return len(entries(own_cache))

    encoder_of(folder).encode(TEXTS[:1])
    encoder_of(folder, torch.bfloat16).encode(TEXTS[:1])
    assert count() == 2
    encoder_of(folder, length=4).encode(TEXTS[:1])
    assert count() == 3
    tokenizer = folder.tokenizer / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    encoder_of(folder).encode(TEXTS[:1])
    assert count() == 4
    torch.manual_seed(5)
    text: TextConfig = folder.components["text_encoder"].config
    save_module(
        UMT5Encoder(text).state_dict(), encoder_to_transformers(text), folder.path / "text_encoder",
        torch.float32,
    )
    encoder_of(open_model(str(folder.path))).encode(TEXTS[:1])
    assert count() == 5
    monkeypatch.setattr(prompts, "fingerprint", lambda: {"machine": "another"})
    encoder_of(open_model(str(folder.path))).encode(TEXTS[:1])
    assert count() == 6
    moved = tmp_path / "elsewhere"
    folder.path.rename(moved)
    forbid_loading(monkeypatch)
    encoder_of(open_model(str(moved))).encode(TEXTS[:1])


@pytest.mark.parametrize("damage", [b"", b"\x08", None])
def test_a_damaged_entry_is_made_anew(folder, own_cache, damage):
    expected, _ = encoder_of(folder).encode(TEXTS[:1])
    (entry,) = entries(own_cache)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-3] if damage is None else damage)
    given, _ = encoder_of(folder).encode(TEXTS[:1])
    assert torch.equal(given, expected)
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_only_warned_of(folder, own_cache, caplog):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file in the way")
    encoder_of(folder).encode(TEXTS[:1])
    assert "can't be kept for next time" in caplog.text


def test_files_are_hashed_only_when_a_prompt_comes(folder, monkeypatch):
    hashed = []
    real = prompts.hash_files
    monkeypatch.setattr(prompts, "hash_files", lambda paths: hashed.append(1) or real(paths))
    encoder = encoder_of(folder)
    assert not hashed
    encoder.encode(TEXTS[:1])
    encoder.encode(TEXTS[1:])
    assert hashed == [1]


def test_small_text_encoders_are_not_cached(folder, own_cache, monkeypatch):
    monkeypatch.setattr(prompts, "WORTHWHILE_BYTES", 100_000_000)
    encoder_of(folder).encode(TEXTS)
    assert not own_cache.exists()


def test_what_was_unused_longest_goes_first(tmp_path):
    cache = PromptCache(tmp_path, "test", limit=3 * 4200)
    for index in range(3):
        cache.put(str(index), torch.full((1, 1024), float(index)))
        (newest,) = set(entries(tmp_path)) - {p for p in entries(tmp_path) if p.stat().st_mtime < 9}
        os.utime(newest, (index, index))
    assert cache.get("0") is not None
    cache.put("3", torch.zeros(1, 1024))
    assert cache.get("1") is None
    assert all(cache.get(name) is not None for name in "023")
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 3 * 4200


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
def test_int8_is_another_cache(folder):
    tokenizer = PromptTokenizer(folder.tokenizer)
    plain = PromptCache.of(ModelLoader(folder, CPU, torch.bfloat16), tokenizer)
    small = PromptCache.of(ModelLoader(folder, CPU, torch.bfloat16, quantize="int8"), tokenizer)
    plain.put("a", torch.ones(1, 2))
    assert small.get("a") is None
    assert plain.get("a") is not None
