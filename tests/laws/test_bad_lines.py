"""A record that cannot be read is named by its file and line, wherever in the file it is and whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.errors import DataError
from dovetail.tasks.find import read_records

GOOD = json.dumps({"q": "café, naïve", "answer": "b"}, ensure_ascii=False).encode() + b"\n"
BAD = {
    "latin-1": b'{"q": "caf\xe9", "answer": "x"}\n',
    "cut character": b'{"q": "a", "answer": "\xe2\x82"}\n',
    "null": b'{"q": "c", "answer": null}\n',
    "number": b'{"q": "c", "answer": 3}\n',
    "no column": b'{"q": "c"}\n',
    "no object": b'["a", "b"]\n',
    "half a line": b'{"q": "c", "ans\n',
    "half a surrogate pair": b'{"q": "c", "answer": "\\ud800"}\n',
}


@pytest.mark.parametrize("before", [0, 1, 137, 5000])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_line_is_named(what: str, before: int, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * (before % 2) + GOOD * before + BAD[what] + GOOD)
    columns = {"prompt": "q", "answer": "answer", "pair": "pair"}
    with pytest.raises(DataError) as refused:
        read_records(path, "generation", columns)
    assert refused.value.where == f"{path}, line {before + 1}"
    assert len(read_records(path, "generation", columns, limit=before)) == before if before else True
