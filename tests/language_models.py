"""Tiny causal language models as transformers saves them: of random weights, or taught answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from vidgen.pipeline import rewrite
from vidgen.pipeline.rewrite import LanguageModel
from vidgen.story import expand as draft

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Lesson = tuple[str, Sequence[str], str]
"""(instruction, the user's turns and earlier answers, the answer)."""


def build_language_model(
    folder: Path, lessons: Sequence[Lesson] = (), *, template: str | None = TEMPLATE,
    steps: int = 300,
) -> Path:
    """A tiny GPT-2 with a tokenizer of its lessons' words; without lessons it talks rubbish."""
    torch.manual_seed(0)
    texts = [text for instruction, turns, answer in lessons
             for text in (instruction, *turns, answer)]
    tokenizer = _tokenizer(texts or [rewrite.INSTRUCTION, draft.INSTRUCTION], template)
    tokenizer.save_pretrained(folder)
    longest = max((len(tokenizer(" ".join((instruction, *turns, answer))).input_ids)
                   for instruction, turns, answer in lessons), default=500)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=longest + 100, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    _teach(model, tokenizer, lessons, steps)
    model.save_pretrained(folder)
    return folder


def _tokenizer(texts: Sequence[str], template: str | None) -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", pad_token="<end>", chat_template=template
    )


def _teach(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson],
    steps: int,
) -> None:  # fmt: skip
    """Learn the answers by heart; greedy decoding then gives them."""
    batches = []
    for instruction, turns, answer in lessons:
        asked = LanguageModel._tokens(tokenizer, instruction, turns)
        said = tokenizer(answer + "<end>", return_tensors="pt").input_ids
        tokens = torch.cat([asked, said], dim=1)
        labels = tokens.clone()
        labels[:, : asked.shape[1]] = -100
        batches.append((tokens, labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps if batches else 0):
        loss = sum(model(tokens, labels=labels).loss for tokens, labels in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9 and loss.item() < 0.02 * len(batches):
            break
