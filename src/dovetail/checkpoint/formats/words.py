"""Codes in 32-bit words without gaps, the first code in the lowest bits: the order of GPTQ and of MLX.

32 codes of b bits fill b words. A code may straddle two words (3 and 6 bits). `chains.packing` has the other order.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def to_words(codes_ri: Tensor, bits: int) -> Tensor:
    """Pack the codes of each row: int32 (r, i * bits / 32).

    codes_ri  (r, i) uint8; i a multiple of 32

    >>> to_words(torch.arange(32, dtype=torch.uint8)[None] % 16, bits=4)[0, 0].item() == 0x76543210
    True
    """
    (r, i) = codes_ri.shape
    units = codes_ri.view(r, i // WORD, WORD)
    words = torch.zeros(r, i // WORD, bits, dtype=torch.int64, device=codes_ri.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = units[..., place].to(torch.int64)
        words[..., word] |= code << shift & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    return words.to(torch.int32).view(r, -1)


def from_words(words_rw: Tensor, bits: int) -> Tensor:
    """Return the codes of each row of words, uint8 (r, w * 32 / bits).

    words_rw  (r, w) int32 or uint32; w a multiple of bits
    """
    (r, w) = words_rw.shape
    words = words_rw.to(torch.int64).view(r, w // bits, bits) & 0xFFFFFFFF
    codes = torch.empty(r, w // bits, WORD, dtype=torch.uint8, device=words_rw.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = words[..., word] >> shift
        if shift + bits > WORD:
            code |= words[..., word + 1] << (WORD - shift)
        codes[..., place] = code & (2**bits - 1)
    return codes.view(r, -1)
