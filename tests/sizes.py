"""Part of `make check`: files stay readable, the package stays small."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 300
MAX_MODEL_NBYTES = 8 * 2**20
REASONED = {
    # file: why it is one room all the same
}


def main() -> int:
    bad = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        name, lines = str(path.relative_to(ROOT)), len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES and name not in REASONED:
            bad.append(f"{name}: {lines} lines, at most {MAX_LINES} without a reason")
    model = sum(p.stat().st_size for p in (ROOT / "src/dovetail/tasks/playground/model").glob("*.safetensors"))
    if model > MAX_MODEL_NBYTES:
        bad.append(f"playground model: {model} bytes, at most {MAX_MODEL_NBYTES}")
    print("\n".join(bad) if bad else "sizes: all within bounds")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
