"""Kokoro by its own package, with a tiny model of its own classes and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vidgen.core.errors import InputError
from vidgen.media.sound import RATE
from vidgen.media.speech import open_voice, speak

kokoro = pytest.importorskip("kokoro", reason="Kokoro is not here: pip install 'vidgen[kokoro]'")

CONFIG = {
    "vocab": {sign: place for place, sign in enumerate(";:,.!? abdefghijklmnopɾstuβθðɣ", 1)},
    "n_token": 40, "hidden_dim": 512, "style_dim": 128, "n_layer": 1, "max_dur": 8, "dropout": 0.0,
    "text_encoder_kernel_size": 3, "n_mels": 80,
    "plbert": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
               "num_hidden_layers": 1, "max_position_embeddings": 512},
    "istftnet": {
        "upsample_kernel_sizes": [20, 12], "upsample_rates": [10, 6], "gen_istft_hop_size": 5,
        "gen_istft_n_fft": 20, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
        "upsample_initial_channel": 512,
    },
}
PARTS = ("bert", "bert_encoder", "predictor", "text_encoder", "decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kokoro folder as it is published: settings, weights and two Spanish voices."""
    folder = tmp_path_factory.mktemp("kokoro")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "voices").mkdir()
    torch.manual_seed(0)
    torch.save({}, folder / "none.pth")
    model = kokoro.KModel("hexgrad/Kokoro-82M", dict(CONFIG), str(folder / "none.pth"))
    (folder / "none.pth").unlink()
    torch.save({name: getattr(model, name).state_dict() for name in PARTS},
               folder / "kokoro-v1_0.pth")
    for name in ("ef_dora", "em_alex"):
        torch.save(torch.randn(510, 1, 256), folder / f"voices/{name}.pt")
    return folder


def test_a_sentence_is_the_packages_own(folder: Path) -> None:
    path = folder / "voices/ef_dora.pt"
    voice = open_voice(str(path))
    said = voice.say("Un gato.")
    model = kokoro.KModel("x", str(folder / "config.json"), str(folder / "kokoro-v1_0.pth"))
    pipeline = kokoro.KPipeline("e", "x", model.eval())
    torch.manual_seed(0)
    (part,) = pipeline("Un gato.", voice=str(path))
    assert said.dtype == np.float32
    assert said.shape == (2 * len(part.audio), 1)  # from 24 to 48 kHz
    assert np.allclose(said[::2, 0][200:-200], part.audio.numpy()[200:-200], atol=0.1)
    assert np.array_equal(said, voice.say("Un gato."))
    assert not np.array_equal(said, open_voice(str(folder / "voices/em_alex.pt")).say("Un gato."))
    assert voice.facts["voice"] == "ef_dora"
    assert voice.facts["engine"].startswith("kokoro 0.")
    assert len(voice.facts["sha256"]) == len(voice.facts["model_sha256"]) == 64


def test_it_speaks_in_clips_and_draws_no_luck_of_others(folder: Path) -> None:
    before = torch.random.get_rng_state()
    said = speak([(0.5, "Un gato. Una flor.")], str(folder / "voices/ef_dora.pt"), 20 * RATE)
    assert [each.text for each in said.sentences] == ["Un gato.", "Una flor."]
    assert said.sentences[0].start_s == 0.5
    assert said.samples[RATE // 2 :].any()
    assert torch.equal(before, torch.random.get_rng_state())


def test_files_that_are_no_voices_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "kokoro"))
    (copy / "voices/ef_dora.pt").write_bytes(b"no tensor")
    with pytest.raises(InputError, match="can't be loaded by Kokoro's package"):
        open_voice(str(copy / "voices/ef_dora.pt"))
    (copy / "kokoro-v1_0.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="can't be loaded by Kokoro's package"):
        open_voice(str(copy / "voices/em_alex.pt"))


def test_english_is_refused_unless_what_it_needs_is_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "kokoro"))
    path = shutil.copy(copy / "voices/ef_dora.pt", copy / "voices/af_heart.pt")
    monkeypatch.setattr("vidgen.media.speech.find_spec", lambda _name: None)
    with pytest.raises(InputError, match="python -m spacy download en_core_web_sm"):
        open_voice(str(path))
