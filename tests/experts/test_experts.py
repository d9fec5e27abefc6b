"""Experts: what is kept is what the paper keeps, comes back bit for bit, near the entropy, or is refused."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import expert_reader
from dovetail import experts
from dovetail.chains import compiled
from dovetail.errors import DataError, DovetailError, LoadError
from dovetail.experts.codec import native
from dovetail.experts.vectors import Spec, TaskVector
from dovetail.models.fingerprint import model_fingerprint

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DENSITIES = [0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 1.0]


def vector(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def expected(task_vector: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Signs of the k largest, by sorting: equal ones in order of name and index, zeros not at all."""
    flat = torch.cat([task_vector[name].double().reshape(-1) for name in sorted(task_vector)])
    chosen = flat.abs().sort(descending=True, stable=True).indices[: round(density * flat.numel())]
    signs, at, out = torch.zeros_like(flat), 0, {}
    signs[chosen] = flat[chosen].sign()
    for name in sorted(task_vector):
        out[name] = signs[at : at + task_vector[name].numel()].reshape(task_vector[name].shape)
        at += task_vector[name].numel()
    return out


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def check(task_vector: dict[str, Tensor], density: float, path: Path, scale: str = "vector") -> experts.Expert:
    """Compresses, saves, loads and decodes in every way, and compares with sorting."""
    made = experts.compress(task_vector, density, 1.5, scale)  # type: ignore[arg-type]
    signs = expected(task_vector, density)
    saved = experts.load(made.save(path))
    assert path.stat().st_size == made.nbytes == saved.nbytes
    assert saved.header == made.header
    whole = flat(task_vector)
    for name, tensor in task_vector.items():
        own = whole if scale == "vector" else tensor.double().reshape(-1)
        spread = own.std().item() if own.numel() > 1 else 0.0
        assert saved.scales[name] == pytest.approx(1.5 * spread, rel=1e-9, abs=1e-15)
        unit = torch.tensor(saved.scales[name], dtype=torch.float64).to(tensor.dtype)
        decoded = saved.dense()[name]
        assert decoded.dtype == tensor.dtype
        assert torch.equal(decoded, signs[name].to(tensor.dtype) * unit)
        at, sign = saved.indices(name)
        assert torch.equal(at, signs[name].reshape(-1).nonzero().reshape(-1))
        assert torch.equal(sign, signs[name].reshape(-1)[at].to(torch.int8))
    masks = saved.masks()
    assert masks.kept == saved.kept == int(flat(signs).abs().sum())
    again = experts.from_masks(masks, saved)
    assert all(torch.equal(a, b) for a, b in zip(saved.dense().values(), again.dense().values(), strict=True))
    return saved


def shape_of(size: int, random: np.random.Generator) -> tuple[int, ...]:
    """Some shape of so many values: a row, a column, tall, wide or deep."""
    if size == 0:
        return [(0,), (0, 5), (3, 0, 2)][random.integers(3)]
    side = int(random.choice([d for d in range(1, 65) if size % d == 0]))
    return [(size,), (size // side, side), (side, size // side), (1, side, 1, size // side)][random.integers(4)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_of_every_size(tmp_path, dtype):
    """0 to 2^20 values: ends of bytes, words, sub-blocks and blocks, one less and one more, and sizes between."""
    own = FLOATS.index(dtype)
    random = np.random.default_rng(own)
    sizes = [0, 1, 2, 7, 8, 9, 63, 64, 65, *(4096 * j + d for j in (1, 2, 15, 16) for d in (-1, 0, 1))]
    large = [65536 * j + d for j in (2, 3, 4, 16) for d in (-1, 0, 1) if 65536 * j + d <= 1 << 20]
    sizes += large[own :: len(FLOATS)] + [int(2 ** random.uniform(0, 20)) for _ in range(4)]  # each large one by one
    for number, size in enumerate(sizes):
        task_vector = vector({"w": shape_of(size, random)}, number, dtype)
        if random.random() < 0.3:  # unlike stretches, which take sub-blocks
            task_vector["w"].view(-1)[: size // 3] *= 0.1
        check(task_vector, float(random.choice(DENSITIES)), tmp_path / "x.dvt")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_of_every_shape_and_density(tmp_path, dtype):
    shapes = {"b.empty": (0, 5), "a.scalar": (), "c.row": (1, 300), "d.deep": (3, 1, 5, 7), "tall": (900, 6)}
    for density in DENSITIES:
        task_vector = vector(shapes, dtype=dtype)
        task_vector["tall"] *= torch.tensor([8, 0.1, 3, 0.01, 1, 0]).to(dtype)
        for scale in ("vector", "tensor"):
            check(task_vector, density, tmp_path / "x.dvt", scale)


def test_ties_go_to_the_lowest_index(tmp_path):
    for dtype in FLOATS:
        check({"b": torch.ones(1000, dtype=dtype), "a": -torch.ones(70, dtype=dtype)}, 0.3, tmp_path / "x.dvt")
        values = torch.randint(-3, 4, (5000,), generator=torch.Generator().manual_seed(1)).to(dtype)
        for density in DENSITIES:  # seven values, of which zero is never kept
            check({"w": values[:4000].reshape(1000, 4), "v": values[4000:]}, density, tmp_path / "x.dvt")
    tall = torch.ones(4096, 8)
    tall[:, 1:] *= 1e-3
    made = check({"tall": tall}, 0.12, tmp_path / "x.dvt")
    assert made.header.tensors[0].order == "columns"
    tiny = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-22, 2.0**-140, 0.0, -0.0])
    check({"w": tiny}, 0.5, tmp_path / "x.dvt")
    check({"w": tiny.double() + torch.arange(6) * 2.0**-52}, 0.4, tmp_path / "x.dvt")


def test_tensors_of_several_dtypes_are_one_vector(tmp_path):
    task_vector = {f"w{i}": vector({"w": (500,)}, i, dtype)["w"] for i, dtype in enumerate(FLOATS)}
    check(task_vector, 0.1, tmp_path / "x.dvt")
    strided = {"w": torch.randn(40, 30).t(), "v": torch.randn(100)[::2]}
    check(strided, 0.2, tmp_path / "x.dvt")


class Made(Mapping[str, Tensor]):
    """Makes its tensors anew whenever it is asked for one, and counts how many are held."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked, self.held, self.most = tensors, 0, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        self.asked += 1
        tensor = self.tensors[name]
        if not tensor.numel():
            return tensor
        array = tensor.view(-1).view(torch.uint8).numpy().copy()  # a tensor's memory keeps hold of it
        weakref.finalize(array, self.release)
        self.held += 1
        self.most = max(self.most, self.held)
        return torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)

    def release(self) -> None:
        self.held -= 1

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("scale", ["vector", "tensor"])
def test_of_tensors_made_anew_one_is_held_and_each_is_asked_for_once_a_pass(scale, monkeypatch):
    monkeypatch.setattr("dovetail.experts.ternary._PIECE", 1 << 10)
    shapes = {"a": (700, 3), "b": (1024,), "c": (5,), "d": (0, 2)}
    for dtypes, passes in (
        ((torch.bfloat16,), 2),
        ((torch.float32,), 3),
        ((torch.float64,), 5),
        ((torch.float16, torch.float32), 3),
    ):
        plain = vector(shapes)
        plain = {name: plain[name].to(dtypes[at % len(dtypes)]) for at, name in enumerate(plain)}
        made = Made(plain)
        specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in plain.items()}
        found = experts.compress(TaskVector(made, specs=specs), 0.1, 1.0, scale)
        right = experts.compress(plain, 0.1, 1.0, scale)
        assert (made.most, made.asked) == (1, passes * len(plain))
        assert found.header == right.header
        assert all(torch.equal(a, b) for a, b in zip(found.dense().values(), right.dense().values(), strict=True))
    specs["a"] = Spec((3, 700), torch.float16)
    with pytest.raises(DataError, match=r"task vector at a(.|\n)*700, 3"):
        experts.compress(TaskVector(made, specs=specs), 0.1)


def test_what_is_no_number_is_refused_by_name():
    for dtype in FLOATS:
        for value, word in ((math.nan, "1 NaN"), (math.inf, "1 infinite"), (-math.inf, "1 infinite")):
            bad = torch.zeros(70, dtype=dtype)
            bad[69] = value
            with pytest.raises(DataError, match=rf"layer\.3(.|\n)*{word}"):
                experts.compress({"layer.2": torch.ones(3), "layer.3": bad}, 0.5)
    with pytest.raises(DataError, match=r"layer\.4(.|\n)*int64"):
        experts.compress({"layer.4": torch.arange(3)}, 0.5)
    for arguments in ((-0.1,), (1.1,), (math.nan,), (0.5, 0.0), (0.5, math.inf), (0.5, 1.0, "row")):
        with pytest.raises(DataError):
            experts.compress({"w": torch.ones(3)}, *arguments)
    with pytest.raises(DataError, match="500"):
        experts.compress({"w" * 501: torch.ones(3)}, 0.5)
    large = experts.compress({"w": torch.tensor([1e6, -1e6])}, 1.0)
    with pytest.raises(LoadError, match="float16"):
        large.dense(torch.float16)


def test_a_reader_written_from_the_document_reads_it(tmp_path):
    shapes = {"a": (70000,), "b.lora_B": (2100, 8), "c": (0,), "d": ()}
    for density in (0.0, 0.03, 0.4, 1.0):
        task_vector = vector(shapes, int(density * 100))
        task_vector["b.lora_B"] *= torch.exp(1.5 * torch.randn(8, generator=torch.Generator().manual_seed(2)))
        task_vector["a"][:40000] *= 0.2
        saved = check(task_vector, density, tmp_path / "x.dvt")
        header, tensors = expert_reader.read(tmp_path / "x.dvt")
        signs = expected(task_vector, density)
        assert {name: signs[name].reshape(-1).int().tolist() for name in signs} == tensors
        assert header["scales"] == list(saved.header.scales)
        if density == 0.03:
            modes = {int(mode) & 15 for coded in saved.coded.values() for mode in coded.directory["mode"]}
            assert 2 in modes
            assert saved.header.tensors[1].order == "columns"
    with safe_open(tmp_path / "x.dvt", framework="np") as file:
        assert sorted(file.keys()) == ["blocks", "directory"]
        assert sorted(file.metadata()) == ["crc32c", "dovetail"]


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_sizes_are_near_the_entropy(density):
    made = experts.compress(vector({"w": (1 << 21,)}), density)
    entropy = -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)
    nbytes = made.coded["w"].nbytes  # beside a header of half a KiB
    assert 8 * nbytes / made.numel / entropy <= (1.03 if density == 0.01 else 1.02)


def test_rows_of_unlike_scales_take_less_than_their_number_says():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 4096, generator=generator) * torch.exp(torch.randn(512, 1, generator=generator))
    by_rows, by_columns = experts.compress({"a": rows}, 0.05), experts.compress({"b": rows.t()}, 0.05)
    entropy = -0.95 * math.log2(0.95) - 0.05 * math.log2(0.025)
    for made in (by_rows, by_columns):
        assert 8 * made.nbytes / made.numel / entropy <= 0.70
    assert by_columns.header.tensors[0].order == "columns"


def test_decoding_into_given_buffers_and_in_threads():
    made = experts.compress(vector({"w": (1000, 5000), "tall": (30000, 12)}), 0.1)
    whole = made.dense(torch.float16, threads=1)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.values(), made.dense(torch.float16, threads=2).values(), strict=True)
    )
    assert np.array_equal(made.masks(threads=1).words, made.masks(threads=2).words)
    with ThreadPoolExecutor(2) as pool:  # two callers at once
        for result in pool.map(lambda _: made.dense(torch.float16, threads=2), range(4)):
            assert torch.equal(result["w"], whole["w"])
    buffers = {"w": torch.full((1000, 5000), math.nan, dtype=torch.float16), "tall": torch.ones(12, 30000).half().t()}
    places = {name: tensor.data_ptr() for name, tensor in buffers.items()}
    result = made.dense(into=buffers)
    for name, tensor in result.items():
        assert tensor is buffers[name]
        assert tensor.data_ptr() == places[name]
        assert torch.equal(tensor, whole[name])
    with pytest.raises(LoadError, match="tall"):
        made.dense(into={"w": buffers["w"]})
    with pytest.raises(LoadError, match="buffer for w"):
        made.dense(into=buffers | {"w": torch.zeros(5000, 1000)})


def test_one_tensor_is_read_without_the_others(tmp_path):
    made = experts.compress(vector({"a": (70000,), "b": (100, 100), "c": (5,)}), 0.1, scale="tensor")
    path = made.save(tmp_path / "x.dvt")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in c
    path.write_bytes(data)
    part = experts.load(path, tensors=["b"])
    assert list(part.coded) == ["b"]
    assert torch.equal(part.dense()["b"], made.dense()["b"])
    assert experts.load(part.save(tmp_path / "b.dvt")).scales == {"b": made.scales["b"]}
    with pytest.raises(LoadError, match="c, block 0"):
        experts.load(path).dense()
    with pytest.raises(LoadError, match="no tensor nothing"):
        experts.load(path, tensors=["nothing"])


def test_another_base_is_refused_by_name(tmp_path):
    base, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    path = experts.compress({"w": torch.randn(9)}, 0.5, base=base, origin=experts.Origin(chain="lora(r=2)")).save(
        tmp_path / "x.dvt"
    )
    assert experts.load(path, base=base).header.chain == "lora(r=2)"
    with pytest.raises(LoadError, match=model_fingerprint(other)):
        experts.load(path, base=other)
    path = experts.compress(
        {"w": torch.randn(9)}, 0.5, origin=experts.Origin(peft={"r": 8}), provenance={"by": "test"}
    ).save(path)
    assert experts.load(path).header.peft == {"r": 8}
    with pytest.raises(LoadError, match="name the base"):
        experts.load(path, base=base)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    made = experts.compress(vector({"w": (1000,)}), 0.1)
    path = made.save(tmp_path / "x.dvt")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DovetailError, match="disk full"):
        made.with_alpha(2.0).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.dvt"]


def test_alpha_costs_nothing_to_change():
    task_vector = vector({"a": (100,), "b": (50,)})
    for scale in ("vector", "tensor"):
        made = experts.compress(task_vector, 0.2, 1.0, scale)  # type: ignore[arg-type]
        other = experts.compress(task_vector, 0.2, 3.0, scale)  # type: ignore[arg-type]
        assert made.with_alpha(3.0).scales == pytest.approx(other.scales)
        assert made.with_alpha(3.0).coded is made.coded


def five() -> list[experts.Expert]:
    shapes = {"a": (3000, 7), "b": (200,), "c": (5,)}
    return [experts.compress(vector(shapes, i), 0.3, 1 + i / 7, "tensor") for i in range(5)]


def test_similarity_is_that_of_the_decoded_vectors():
    a, b = five()[:2]
    x, y = (flat(e.dense(torch.float64)) for e in (a, b))
    found, both = experts.similarity(a, b), (x != 0) & (y != 0)
    assert found["dot"] == pytest.approx(float(x @ y), rel=1e-12)
    assert found["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(x, y, dim=0)), rel=1e-12)
    assert found["hamming"] == int((x.sign() != y.sign()).sum())
    assert found["sign_agreement"] == pytest.approx(float((x.sign() == y.sign())[both].double().mean()))
    assert (found["kept_a"], found["kept_both"]) == (int((x != 0).sum()), int(both.sum()))
    assert experts.similarity(a, a)["cosine"] == pytest.approx(1.0)
    nothing = experts.compress(vector(a.shapes), 0.0)
    assert experts.similarity(nothing, a)["cosine"] == 0
    with pytest.raises(DataError, match="b: "):
        experts.similarity(a, experts.compress(vector({"a": (3000, 7), "b": (201,), "c": (5,)}), 0.1))


def test_sums_and_elections_are_those_of_the_decoded_vectors():
    all_five = five()
    masks = [e.masks() for e in all_five]
    dense = [flat(e.dense(torch.float64)) for e in all_five]
    weights = [0.5, -1.0, 2.0, 0.25, 1.0]
    total = sum(w * d for w, d in zip(weights, dense, strict=True))
    assert torch.allclose(flat(experts.scaled_sum(masks, weights)), torch.as_tensor(total), atol=1e-5)
    assert torch.equal(flat(experts.sign_sum(masks)), sum(d.sign() for d in dense))
    for count in range(1, 6):
        total, signs = torch.zeros_like(dense[0]), torch.zeros_like(dense[0])
        for d in dense[:count]:
            total, signs = total + d, signs + d.sign()
        elected = experts.from_masks(experts.elect(masks[:count]), all_five[0]).dense(torch.float64)
        assert torch.equal(flat(elected), total.sign())
        elected = experts.from_masks(experts.elect(masks[:count], by="count"), all_five[0]).dense(torch.float64)
        assert torch.equal(flat(elected), signs.sign())
        for chosen in (weights, [1.0, -1.0, 0.0, 1.0, 1.0], [-2.0, -0.5, -1.0, -3.0, 0.0]):
            total = torch.zeros_like(dense[0])
            for w, d in zip(chosen, dense[:count], strict=False):
                total = total + w * d.sign()
            elected = experts.from_masks(experts.elect(masks[:count], chosen[:count], by="count"), all_five[0])
            assert torch.equal(flat(elected.dense(torch.float64)), total.sign())
    with pytest.raises(DataError, match="no expert"):
        experts.elect([])


def test_the_checksum_is_castagnolis():
    assert native.crc32c(b"123456789") == expert_reader.crc32c(b"123456789") == 0xE3069283
    data = bytes(range(200))
    assert native.crc32c(data) == native.crc32c(memoryview(data)) == expert_reader.crc32c(data)
    assert native.crc32c(b"") == 0


def test_a_changed_helper_file_recompiles_the_loops(tmp_path):
    """In a copy of the codec: the loop is in decoding.py, the change in native.py, times and sizes stay the same."""
    codec = Path(native.__file__).parent
    shutil.copytree(codec, tmp_path / "codec", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "codec").glob("*.py"):
        path.write_text(path.read_text().replace("dovetail.experts.codec", "codec"))
        os.utime(path, (10**9, 10**9))
    script = """if True:
        import numpy as np
        from codec.decoding import indices_of
        words = np.array([0b10100], np.uint64)
        print(indices_of(words, 0 * words)[0].tolist(), sum(indices_of.stats.cache_hits.values()))
    """

    def run() -> str:
        env = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        env |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run() == "[2, 4] 0"
    assert run() == "[2, 4] 1"
    helper = tmp_path / "codec" / "native.py"
    changed = helper.read_text().replace("numbers.trailing_zeros", "numbers.leading_zeros")
    assert changed != helper.read_text()
    helper.write_text(changed)
    os.utime(helper, (10**9, 10**9))
    assert run() == "[59, 59] 0"
    folders = [path.name for path in (tmp_path / "codec" / "__pycache__").iterdir() if path.is_dir()]
    assert sorted(name.split("-")[0] for name in folders) == ["decoding", "encoding"]  # those of old contents are gone


def test_compiled_loops_without_a_writable_cache(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(compiled.config, "CACHE_DIR", str(blocked / "folder"))
    compiled._cache_folder.cache_clear()
    try:
        assert compiled.compiled(flat).stats.cache_path is None
    finally:
        compiled._cache_folder.cache_clear()


@pytest.mark.parametrize("seed", [1])
def test_attacks_find_nothing(seed):
    """A short run; `tests/attacks/run.py` makes a long one."""
    from attacks.run import attack

    assert attack(files=1000, seed=seed).total() == 1000


def test_files_that_arent_experts_are_refused(tmp_path):
    with pytest.raises(DovetailError, match="an expert must be a file"):
        experts.load(tmp_path / "none.dvt")
    for data in (b"", b"1234567", b"\xff" * 40, (8).to_bytes(8, "little") + b"{}      ", b"[" * 100000):
        (tmp_path / "x.dvt").write_bytes(data)
        with pytest.raises(DovetailError):
            experts.load(tmp_path / "x.dvt")


def test_a_header_that_no_reader_takes_is_not_written(tmp_path) -> None:
    expert = experts.compress({"w": torch.ones(8)}, 0.5, provenance={"x": "a" * (1 << 24)})
    with pytest.raises(DataError, match="header of"):
        expert.save(tmp_path / "x.dvt")
    assert not list(tmp_path.iterdir())
