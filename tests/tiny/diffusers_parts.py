"""Components that tiny models of several families share: tokenizers, text encoders, VAEs."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

WIDTH = 16
TEXTS = ("a red car bounces across the desert at night", "a cat moves left over the meadow")
SPECIALS = (
    "<pad>", "</s>", "<unk>", "<s>", "<image>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>",
)


def train_tokenizer(texts: tuple[str, ...] = TEXTS, *, length: int = 64, vocab: int = 400) -> Any:
    """A byte-pair tokenizer that ends each text with </s> and pads with <pad>."""
    model = Tokenizer(BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        bos_token="<s>", model_max_length=length,
        extra_special_tokens=list(SPECIALS[4:]),
    )


def t5(width: int = WIDTH) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=400, d_model=width, d_kv=8, num_heads=2, d_ff=WIDTH, num_layers=1,
            feed_forward_proj="gated-gelu",
        )
    )


def clip_text(kind: type[Any] = transformers.CLIPTextModel) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=400, hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
            pad_token_id=0, eos_token_id=1, bos_token_id=3,
        )
    )


def flow(shift: float = 1.0, **options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def image_vae(channels: int, **options: Any) -> Any:
    """The VAE of the text-to-image families at its true stride of 8."""
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, sample_size=32, **options,
    )
