"""Tokenizers of the three common kinds, trained on a few sentences: byte-level BPE, SentencePiece's pieces, words."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Question: which of these is a metal? Answer: copper",
    "Question: what do plants need to grow? Answer: water and sunlight",
    "Question: which animal lays eggs? Answer: a chicken lays eggs",
    "Question: how many legs does a spider have? Answer: eight",
    "The sun is a star. The moon is not a star.\nThe earth turns around the sun.\n\nA year has 365 days.",
] * 4
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZE = 384
"""The vocabulary of a model for any of them."""


def _wrapped(tokenizer: Tokenizer, form: str | None) -> PreTrainedTokenizerFast:
    if form is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=form, pair=f"{form} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bytes_bpe(form: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, form)


def pieces(form: str | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece's pieces as Llama 2 has them: a space is put before a text, and bytes stand for rare characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, form)


def words(form: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words and punctuation; white space is lost."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return _wrapped(tokenizer, form)


TOKENIZERS = {"bytes_bpe": bytes_bpe, "pieces": pieces, "words": words}
