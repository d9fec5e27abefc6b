"""Pretrain the playground's model: `python bench/playground/pretrain.py --output DIR --seed 0`.

The script trains the tokenizer and then the model on the generator's text, and writes a standard Hugging Face
checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from corpus import documents, held_out, pages
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 768
LENGTH = 128
BATCH = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
PAD, END = "<|pad|>", "<|end|>"
PAD_ID, END_ID = 0, 1
"""Special tokens come first in the vocabulary."""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts, with one token a digit so that numbers can be reckoned with.

    One token stands for both the begin and the end of a text, and is never added unasked: the tokens of a prompt
    followed by those of its answer are the tokens of both together.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=2 * LENGTH
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model. Widths are multiples of 128, so that every usual quantization group divides them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True, bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # the fastest of them at this size
    return model


def rows(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token rows of LENGTH + 1: documents one after the other, each ended, every row begun with a new one."""
    stream = pages(seed, held_out())
    row: list[int] = []
    while True:
        for ids in tokenizer(list(islice(stream, 2048)))["input_ids"]:
            row += [*ids, END_ID]
            if len(row) > LENGTH:
                yield row[: LENGTH + 1]
                row = []


def pretrain(output: Path, *, seed: int, tokens: int) -> None:
    """Train tokenizer and model on `tokens` tokens and write the checkpoint to `output`."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(list(islice(documents(f"tokenizer {seed}", held_out()), 20_000)))
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    steps = tokens // (BATCH * LENGTH)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    compiled = torch.compile(loss_of)
    text = rows(seed, tokenizer)
    columns = (TextColumn("pretraining"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        for step in range(steps):
            ids = torch.tensor(list(islice(text, BATCH)))
            rate = min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = compiled(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, loss=loss.item())
            if step % 100 == 0 and not progress.console.is_terminal:  # a log shows no bar
                progress.console.print(f"step {step}/{steps}, loss {loss.item():.3f}")
    model.generation_config.do_sample = False
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{model.num_parameters():,} parameters, {steps} steps, loss {loss.item():.3f}, "
          f"{time.perf_counter() - started:.0f} s: {output}")  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.output, seed=arguments.seed, tokens=arguments.tokens)


if __name__ == "__main__":
    main()
