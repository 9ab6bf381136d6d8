"""The text encoder and tokenizers against transformers, and prompt cleaning against diffusers."""

import json

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from train.toybox.tasks.tokenizer import train_tokenizer
from vidgen.models.presets import TEXT_PRESETS
from vidgen.models.text import TextEncoder, UMT5Encoder, position_buckets
from vidgen.models.tokenizer import PromptTokenizer, clean_prompt
from vidgen.weights.component import fp32_parts
from vidgen.weights.configs import encoder_to_transformers, text_from_transformers
from vidgen.weights.load import load_module

TINY = TEXT_PRESETS["tiny"]
PROMPTS = [
    "A red car bounces across the desert",
    "",
    "two Balloons, one rises; the other falls &amp;amp; spins!",
    "über-naïve ﬁsh №7 in 2024 … 猫 🚗",
    "  white \t space\n everywhere  ",
    "<subject_3> drives past <subject_12>, at night",
    "a</s>b <pad> <0x41>",
]
AWKWARD = [
    "色调艳丽，过曝，静态，细节模糊不清，字幕　整体发灰——最差质量",
    "&lt;b&gt;caf&eacute;&lt;/b&gt; &amp;amp;amp; &#x1F697; &nbsp; &notanentity;",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \ufeff\u200d rides a 🚲",
    " ".join(f"word{i}" for i in range(600)),
    "猫" * 600,
    "\n\t ",
    "",
]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    things, moves = ["car", "balloon", "cars"], ["rises", "falls", "bounces"]
    places = ["across the desert", "at night", "over a meadow"]
    captions = [f"A red {t} {m} {p}, 3 times." for t in things for m in moves for p in places]
    train_tokenizer(captions, folder, vocab_size=420)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_like_folder(tmp_path_factory):
    """A Unigram tokenizer folder of the make that UMT5's is."""
    folder = tmp_path_factory.mktemp("unigram")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_padding()
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
                "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**encoder_to_transformers(TINY))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("length", [1, 7, 300])
def test_encoder_equals_transformers_with_its_own_folder(theirs, tmp_path, length):
    theirs.save_pretrained(tmp_path)
    config = text_from_transformers(json.loads((tmp_path / "config.json").read_text()))
    assert config == TINY
    ours = UMT5Encoder(config)
    ours.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    ids = torch.randint(TINY.vocab_size, (3, length))
    mask = torch.arange(length) < torch.tensor([length, (length + 1) // 2, 1])[:, None]
    with torch.no_grad():
        expected = theirs(ids, mask.long()).last_hidden_state[mask]
        torch.testing.assert_close(ours(ids, mask)[mask], expected, atol=1e-5, rtol=0)
        expected = theirs(ids).last_hidden_state
        torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=0)


def test_float16_keeps_what_overflows_in_float32_as_transformers_does(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    theirs = UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16).eval()
    kept = fp32_parts("text_encoder", torch.float16)
    ours = load_module(lambda: UMT5Encoder(TINY), tmp_path, torch.float16, "cpu", keep_fp32=kept)
    dtypes = {name: value.dtype for name, value in theirs.state_dict().items()}
    assert {name: value.dtype for name, value in ours.state_dict().items()} == {
        name: dtype for name, dtype in dtypes.items() if name != "encoder.embed_tokens.weight"
    }
    assert not fp32_parts("text_encoder", torch.bfloat16)
    ids = torch.randint(TINY.vocab_size, (2, 9))
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
        torch.testing.assert_close(ours(ids), expected, atol=2e-3, rtol=2e-3)


def test_transformers_loads_what_we_write(tmp_path):
    ours = UMT5Encoder(TINY)
    save_file(ours.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(encoder_to_transformers(TINY)))
    theirs, info = UMT5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(TINY.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids), theirs(ids).last_hidden_state, atol=1e-5, rtol=0
        )


def test_presets_are_the_published_architecture():
    theirs = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
    )
    assert text_from_transformers(theirs.to_dict()) == TEXT_PRESETS["umt5-xxl"]
    with torch.device("meta"):
        ours = UMT5Encoder(TEXT_PRESETS["umt5-xxl"]).state_dict()
        expected = UMT5EncoderModel(theirs).state_dict()
    del expected["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}
    assert sum(value.numel() for value in ours.values()) == 5_680_910_336


def test_position_buckets_equal_transformers_at_every_distance():
    config = TEXT_PRESETS["toybox"]
    attention = UMT5Attention(UMT5Config(**encoder_to_transformers(config)), True, 0)
    offsets = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = attention._relative_position_bucket(offsets)
    assert torch.equal(position_buckets(600, config, "cpu"), expected)


@pytest.mark.parametrize("name", ["toy_folder", "sentencepiece_like_folder"])
def test_token_ids_equal_transformers(request, name):
    folder = request.getfixturevalue(name)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.is_fast
    for max_length in (512, 6):
        ours = PromptTokenizer(folder, max_length)
        ids, mask = ours.encode(PROMPTS)
        expected = theirs(
            [prompt_clean(p) for p in PROMPTS],
            padding=True, max_length=max_length, truncation=True, return_tensors="pt",
        )
        assert torch.equal(ids, expected.input_ids)
        assert torch.equal(mask, expected.attention_mask.bool())
        assert all(row[row_mask][-1] == 1 for row, row_mask in zip(ids, mask, strict=True))


def test_token_ids_equal_transformers_t5_class_which_wan_folders_name(
    sentencepiece_like_folder, tmp_path
):
    # this class rebuilds the splitting itself and ignores tokenizer.json's own normaliser, hence
    # only prompts that need none
    settings = json.loads((sentencepiece_like_folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_bytes(
        (sentencepiece_like_folder / "tokenizer.json").read_bytes()
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [*PROMPTS[:3], PROMPTS[4], PROMPTS[5]]
    expected = theirs(
        [prompt_clean(p) for p in prompts], padding=True, max_length=512, truncation=True
    )
    assert PromptTokenizer(tmp_path).encode(prompts)[0].tolist() == expected["input_ids"]


def test_toy_tokenizer_travels_through_transformers(toy_folder, tmp_path):
    theirs = AutoTokenizer.from_pretrained(toy_folder)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    theirs.save_pretrained(tmp_path)
    again, _ = PromptTokenizer(tmp_path).encode(PROMPTS)
    assert torch.equal(again, PromptTokenizer(toy_folder).encode(PROMPTS)[0])
    ids = theirs("A RED car, über &  2 <subject_5> cars")["input_ids"]
    assert theirs.decode(ids, skip_special_tokens=True) == "a red car, über & 2<subject_5> cars"


@pytest.mark.parametrize(
    "prompt",
    [
        *PROMPTS,
        *AWKWARD,
        "âœ” No problems &lt;b&gt; &amp;quot;",
        "ｆｕｌｌ　ｗｉｄｔｈ “quotes” … l’amour",
        "\x1b[36;44mansi\x1b[0m \u200b zero",
    ],
)
def test_prompts_are_cleaned_as_in_wan_pipeline(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)


@pytest.mark.parametrize("name", ["toy_folder", "sentencepiece_like_folder"])
@torch.no_grad()
def test_contexts_equal_those_of_wan_pipeline(request, theirs, name):
    folder = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=theirs, vae=None, scheduler=UniPCMultistepScheduler()
    )
    prompts = [*PROMPTS, *AWKWARD]
    expected, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=512
    )
    ours = UMT5Encoder(TINY)
    state = theirs.state_dict()
    ours.load_state_dict({key: state[key] for key in ours.state_dict()})
    context, lengths = TextEncoder(ours, PromptTokenizer(folder)).encode(prompts)
    assert context.shape == expected.shape == (len(prompts), 512, TINY.hidden_dim)
    long = len(PROMPTS) + AWKWARD.index("猫" * 600)
    assert lengths[long - 1] == lengths[long] == 512 > lengths[0]
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=0)
    for row, length in zip(context, lengths, strict=True):
        assert not row[length:].any()
