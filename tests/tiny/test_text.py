"""The text encoder's bundle and the toybox tokenizer."""

import json
import logging
import re
import subprocess
import sys

import pytest
import torch

from eval.toybox.suite.phrasings import read_phrasings
from train.toybox.tasks.tokenizer import NUM_SUBJECTS, train_tokenizer
from train.toybox.world.captions import nouns
from vidgen.core.errors import InputError, ModelError
from vidgen.models.presets import TEXT_PRESETS
from vidgen.models.text import TextConfig, TextEncoder, UMT5Encoder, encode_tokens
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.models.words import english_words, near_words, slip_count, split_words
from vidgen.weights.configs import encoder_to_transformers, text_from_transformers
from vidgen.weights.folder import embedded_folder

CAPTIONS = [
    f"A {colour} {thing} {move} in the desert."
    for colour in ("red", "blue", "green")
    for thing in ("car", "automobile", "balloon", "penguin")
    for move in ("rises", "falls", "drives to the right", "bounces")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, path, vocab_size=512)
    return path


@pytest.fixture(scope="module")
def text(folder):
    torch.manual_seed(0)
    return TextEncoder(UMT5Encoder(TEXT_PRESETS["tiny"]).eval(), PromptTokenizer(folder))


def test_words_of_the_captions_are_single_tokens(text):
    assert text.tokenizer.count("a red automobile rises") == 4 + 1
    ids, _ = text.tokenizer.encode(["a red car", "A  RED\n CAR", "a Ｒed c&#97;r"])
    assert (ids == ids[0]).all()


def test_anything_else_is_spelt_in_bytes_and_never_lost(text):
    ids, mask = text.tokenizer.encode(["ж", "猫🚗"])
    first_byte = 2 + NUM_SUBJECTS
    spelt = [row[m].tolist() for row, m in zip(ids, mask, strict=True)]
    for prompt, row in zip(["ж", "猫🚗"], spelt, strict=True):
        received = bytes(i - first_byte for i in row if first_byte <= i < first_byte + 256)
        assert received.endswith(prompt.encode())


def test_spare_subjects_are_one_token_each_wherever_they_stand(text):
    plain = text.tokenizer.encode(["a car rises"])[0][0].tolist()
    for index in (0, 7, NUM_SUBJECTS - 1):
        ids = text.tokenizer.encode([f"a <subject_{index}> rises"])[0][0].tolist()
        assert ids == [plain[0], 2 + index, *plain[2:]]


def test_context_of_a_prompt_does_not_depend_on_its_batch(text):
    prompts = ["a red car", "", "a blue balloon rises in the desert."]
    context, lengths = text.encode(prompts)
    assert context.shape == (3, int(lengths.max()), 16)
    assert lengths.tolist() == [text.tokenizer.count(prompt) for prompt in prompts]
    assert int(lengths[1]) == 1
    for prompt, rows, length in zip(prompts, context, lengths.tolist(), strict=True):
        alone, _ = text.encode([prompt])
        torch.testing.assert_close(rows[:length], alone[0])
        assert (rows[length:] == 0).all()


def test_over_long_prompt_is_cut_with_a_warning_and_keeps_its_end_mark(folder, caplog):
    tokenizer = PromptTokenizer(folder, max_length=6)
    assert tokenizer.count("red " * 10) == 11
    with caplog.at_level(logging.WARNING):
        ids, _ = tokenizer.encode(["red " * 10])
    assert ids.shape == (1, 6)
    assert ids[0, -1] == 1
    assert "11 tokens; the last 5 are cut, the model reads 6" in caplog.text


def test_unknown_words_come_with_the_nearest_known(text):
    unknown = text.tokenizer.unknown_words(
        "A pengiun and a xylophone rise: RED car <subject_3>, xylophone"
    )
    assert [word for word, _ in unknown] == ["pengiun", "and", "xylophone", "rise"]
    nearest = dict(unknown)
    assert nearest["pengiun"] == ["penguin"]
    assert nearest["rise"][0] == "rises"
    assert nearest["xylophone"] == []


def test_slips_are_letters_missing_added_changed_and_swapped():
    for word, other, slips in (
        ("cat", "cat", 0), ("crabb", "crab", 1), ("ctiy", "city", 1), ("rockit", "rocket", 1),
        ("umbrlea", "umbrella", 2), ("cat", "dog", 3), ("", "dog", 3),
    ):  # fmt: skip
        assert slip_count(word, other) == slip_count(other, word) == slips


def test_only_slips_are_near():
    known = {"its", "city", "tiny", "rotates", "lion", "on", "beach", "weather", "water"}
    assert near_words("ctiy", known) == ["city"], "two swapped letters are one slip"
    assert near_words("watre", known) == ["water"]
    assert near_words("is", known) == [], "short words are near too many"
    assert near_words("pirouettes", known) == [], "another word is no slip"


def test_no_near_word_is_missed():
    """Words that share too few letters are left out unlooked at, and no others."""
    known = sorted(english_words())[::500]
    for word in filter(lambda word: len(word) > 2, known):
        typed = word[1] + word[0] + word[2:-1] + "x"
        most = 1 if len(typed) < 6 else 2
        within = {other for other in known if len(other) > 1 and slip_count(typed, other) <= most}
        near = near_words(typed, known)
        assert set(near) <= within
        assert len(near) == min(3, len(within))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("umbrlela", "umbrella"), ("heilcoptr", "helicopter"), ("numbrella", "umbrella"),
        ("tarctr", None), ("poppins", None), ("banksy", None),
    ],
)  # fmt: skip
def test_two_slips_are_read_in_long_words_that_begin_alike(word, meant):
    tokenizer = PromptTokenizer(embedded_folder("toybox") / "tokenizer")
    assert tokenizer.replacements(word).get(word) == meant


def test_slips_people_make_are_near_what_they_meant():
    tokenizer = PromptTokenizer(embedded_folder("toybox") / "tokenizer")
    written = [p for p in read_phrasings(200) if p.kind == "typos"]
    named = 0
    for scene, text, _ in written:
        meant = text
        for word, near in tokenizer.unknown_words(text):
            meant = re.sub(rf"\b{word}\b", near[0] if near else word, meant)
        named += any(noun in meant for noun in nouns(scene.actors[0].sprite))
    assert named >= 0.95 * len(written)


def test_without_a_word_list_no_word_is_unknown(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert PromptTokenizer(tmp_path).unknown_words("pengiun") == []


def test_words_leave_out_numbers_marks_and_tokens():
    words = split_words("It's 3 O'Clock: <subject_1> snow-storm!")
    assert words == ["it's", "o'clock", "snow", "storm"]


def test_gradients_reach_every_weight_of_the_encoder(text):
    encoder = UMT5Encoder(TEXT_PRESETS["tiny"])
    ids, mask = text.tokenizer.encode(CAPTIONS[:4])
    encode_tokens(encoder, ids, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_config_travels_through_json():
    for config in TEXT_PRESETS.values():
        settings = json.loads(json.dumps(encoder_to_transformers(config)))
        assert text_from_transformers(settings) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5'"),
        ({"feed_forward_proj": "relu"}, "'relu'"),
        ({"d_model": None}, "d_model"),
        ({"relative_attention_num_buckets": 30}, "num_buckets 30"),
    ],
)
def test_config_that_is_not_umt5_is_refused(change, message):
    settings = encoder_to_transformers(TEXT_PRESETS["tiny"]) | change
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        text_from_transformers(settings)


def test_tokenizer_folder_without_a_usable_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="missing"):
        PromptTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ModelError, match="be read as a tokenizer"):
        PromptTokenizer(tmp_path)


def test_tokenizer_larger_than_the_encoder_is_refused(folder):
    small = TextConfig(
        vocab_size=64, hidden_dim=8, head_dim=4, ffn_dim=8, num_layers=1, num_heads=2
    )
    with pytest.raises(ModelError, match="only 64"):
        TextEncoder(UMT5Encoder(small), PromptTokenizer(folder))


def test_vocabulary_stays_within_its_size_and_too_small_a_one_is_refused(tmp_path):
    assert train_tokenizer(CAPTIONS, tmp_path, vocab_size=400) <= 400
    with pytest.raises(InputError, match="322 fixed"):
        train_tokenizer(CAPTIONS, tmp_path, vocab_size=300)


def test_reading_prompts_imports_neither_transformers_nor_diffusers(folder):
    program = (
        "import sys; from vidgen.models.tokenizer import PromptTokenizer;"
        "import vidgen.diffusion.condition, vidgen.diffusion.samplers;"
        f"PromptTokenizer({str(folder)!r}).encode(['a red car']);"
        "print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
