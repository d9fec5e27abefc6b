"""How one block is coded: up to 65,536 values of which some are kept, each with a sign (`docs/format.md`).

Kept values are numbered by where they are in the block. Between neighbours lies a gap g, the number of values that
aren't kept, which Golomb's code for geometric gaps with a power of two (Rice 1979) writes as g div 2^k in unary and
g mod 2^k in k bits. At density p that takes k + 1 + q/(1-q) + 1 bits a kept value, q = (1-p)^(2^k), sign included:
1.009 times the entropy at 5%. With k = 0 it is the bitmap of the kept values.

Loops that are compiled, and the parts that are compiled into them, stand in one file, `encoding` or `decoding`: numba
keeps a compiled loop until the file that it is in changes, whatever happens to others.
"""

BLOCK, SUB = 65536, 4096
EMPTY, RICE, SUBS, FULL = 0, 1, 2, 3
PAYLOAD = BLOCK // 8 * 2
"""Bytes that no payload exceeds: a bitmap, and a sign for each value."""
RAW, KEPT = PAYLOAD + 64, BLOCK + 64
"""Lengths of the arrays that a block is coded in; what is behind the payload is zero."""
MAX_K = 15
