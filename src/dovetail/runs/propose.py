"""A first recipe for a model and a data file: both are read, and what they hold decides every key.

1. The format is found by the columns of the first row, and the template by rendering a sample of the conversations.
2. The records are tokenized. `max_length` is the 95th percentile of their lengths, or more where a record would
   otherwise lose everything that the loss counts.
3. Chains and batches are tried from the best to the smallest, and the first one is taken whose predicted peak
   (`dovetail.runs.plan`) fits the memory of this machine.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
import yaml

from dovetail.chains.assignment import assign
from dovetail.chains.layer.held import held
from dovetail.checkpoint.config import best_device, empty_model, load_config, load_tokenizer
from dovetail.checkpoint.footprint import count_weights
from dovetail.display.format import percent, size
from dovetail.errors import DataError, DovetailError
from dovetail.files import check_file, refusal, write_bytes
from dovetail.models.locate import PLAYGROUND, resolve
from dovetail.runs.fit import parse_size
from dovetail.runs.folder import choose_output
from dovetail.runs.plan import Plan, plan
from dovetail.tasks.files import read_rows, split_of
from dovetail.tasks.find import load_task, number_of_labels
from dovetail.tasks.formats import FORMATS, detect
from dovetail.tasks.holding import free_memory
from dovetail.tasks.lengths import length_limit
from dovetail.tasks.spec import Data
from dovetail.tasks.task import HEAD_KINDS, Record, Task
from dovetail.tasks.templates import TEMPLATES
from dovetail.tasks.tokens import IGNORED, Example, RowMaker, last_turn
from dovetail.tasks.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHARE = 0.8
"""The share of the free memory that a training may take; the program and the allocator need the rest."""
BATCH = 16
"""Rows of an optimizer step."""
SAMPLE = 5000
"""Records that are tokenized to find the lengths."""
LONGEST_TEXT = 1024
"""Tokens of a row of plain text, which continues in the next row."""
VALIDATION = 0.1
"""The share of the records that becomes the validation split where the data have none."""
SHORT = 3
"""Words of an answer up to which answers are compared; likelihoods of longer ones say more."""
SMALL, SMALL_SCALE = 20e6, 10
"""Parameters of a model that takes larger learning rates, and how many times larger."""
SCORED = 200
"""Records that are scored after each stage."""
_CHAINS = ("lora(r=16)", "nf4 >> lora(r=16) >> regrid", "nf4 >> lora(r=16) >> regrid(start=codes)", "lora(r=4)")
_BATCHES = ((16, False), (4, False), (4, True), (1, True))
"""Rows of a batch, and whether activations are computed again: from fast to small."""


@dataclass(frozen=True)
class Proposal:
    """A recipe as text with comments, and what decided it.

    facts    what was found or chosen -> the value and its reason
    kind     of the records
    """

    text: str
    facts: dict[str, str]
    kind: str


@dataclass(frozen=True)
class _Lengths:
    """Tokens of the records: of 95 % at most `most`, of the longest `longest`; `needed` for all, and how many are cut.

    counted   the records that were tokenized, of all
    """

    most: int
    longest: int
    needed: int
    counted: int
    rows: Sequence[int] = field(repr=False)

    def over(self, limit: int) -> int:
        """Return the number of tokenized records with more tokens."""
        return sum(tokens > limit for tokens in self.rows)


@dataclass(frozen=True)
class _Setting:
    """What was tried, and the plan of it."""

    chain: str
    batch_size: int
    gradient_checkpointing: bool
    dtype: str | None
    plan: Plan


def propose(
    model: str,
    data: str | Path,
    *,
    output: str | Path = "recipe.yaml",
    format: str | None = None,
    fields: Mapping[str, str] | None = None,
    memory: str | int | None = None,
    on_step: Callable[[str], object] = lambda text: None,
) -> Proposal:
    """Write a commented recipe that tunes a model on a data file, and return it.

    model    as for `dovetail.load`; only its configuration and its tokenizer are read
    data     a file, or a folder: of one split, or with a file of each split (train.jsonl, validation.jsonl, test.jsonl)
    output   the file to write, which must not exist; paths in it are relative to its folder
    format   of the data; found by the columns when not given
    fields   field of the format -> column of the file
    memory   bytes, or a text such as "16GB"; the free memory of the accelerator or of this machine when not given
    on_step  called with what is done next

    Raises DovetailError for a model that cannot learn from such records, and where no training fits the memory.
    """
    output = Path(output)
    if output.exists():
        rule, fix = "the recipe must be a new file", "name another file with --output, or remove this one"
        raise DovetailError(f"output {output}", found="a file that exists", rule=rule, fix=fix)
    check_file(output)
    on_step("read the data")
    part = _data_part(Path(data), format, dict(fields or {}))
    task = load_task(_checked(part))
    config = load_config(model)
    _check_writes(model, config, task)
    tokenizer = load_tokenizer(model)
    template, why = _template(config, tokenizer, task)
    if template is not None:
        part["template"] = template
    if _short(config, task):
        part["metric"] = "exact_match"
    task = load_task(_checked(part))
    empty = empty_model(config, task_kind=task.kind, num_labels=number_of_labels(task))
    on_step("tokenize the data")
    lengths = _lengths(empty, tokenizer, task)
    most = min(lengths.most, LONGEST_TEXT) if task.kind == "text" else lengths.most
    max_length = max(2, -(-max(most, lengths.needed) // 8) * 8)
    max_length = min(max_length, length_limit(empty, tokenizer, max_length, task.split("train")))
    found, where = (parse_size(memory), "given") if memory is not None else _memory()
    setting = _fitting(model, config, task, max_length, int(SHARE * found), on_step)
    facts = {
        "model": f"{model}: {type(empty).__name__}, {count_weights(empty) / 1e6:,.1f} million parameters",
        "data": _data_said(part, task),
        "lengths": _lengths_said(lengths, max_length, task),
        "memory": f"{size(found)} {where}; the training takes {size(setting.plan.predicted_peak_memory_nbytes or 0)}",
        "chain": f"{setting.chain}{_chain_said(setting)}",
        "batch": _batch_said(setting),
    }
    if why:
        facts = {**facts, "template": why}
    rows = _scored_rows(empty, lengths, int(SHARE * found))
    text = _text(model, part, task, setting, max_length, rows, facts, count_weights(empty), output)
    write_bytes(output, text)
    return Proposal(text, facts, task.kind)


def _data_part(path: Path, format: str | None, fields: dict[str, str]) -> dict[str, Any]:
    """Return the data part of a recipe for a file or a folder, with absolute paths."""
    path = path.expanduser().absolute()
    files = _files_of_splits(path) or {"train": path}
    if format is not None and format not in FORMATS:
        rule = "a format must be one of " + ", ".join(FORMATS)
        raise DataError("format", found=format, rule=rule, fix="name one of these formats")
    if format is None:
        row = next(read_rows(files["train"]), None)
        if row is None:
            rule = "a data file must contain at least one record"
            raise DataError(str(path), found="no records", rule=rule, fix="add records")
        try:
            format = detect(row, fields)
        except DataError as error:
            fix = "name the format and the columns, as in --format prompt_completion --field prompt=COLUMN"
            raise DataError(error.where, found=error.found, rule=error.rule, fix=fix) from None
    name = re.split(r"[.]", path.name)[0] or path.name
    part: dict[str, Any] = {"name": name, **{split: str(file) for split, file in files.items()}, "format": format}
    if fields:
        part["fields"] = fields
    if not {"validation", "test"} & set(files):
        part["split"] = VALIDATION
    return part


def _files_of_splits(path: Path) -> dict[str, Path]:
    """Return split -> file of a folder that has one file of each split; {} for others, which are read as one split."""
    if not path.is_dir():
        return {}
    found = [(split_of(file), file) for file in sorted(path.iterdir()) if file.is_file()]
    files = {split: file for split, file in found if split is not None}
    return files if len(files) == len([split for split, _ in found if split]) and "train" in files else {}


def _checked(part: Mapping[str, Any]) -> Data:
    try:
        return Data.model_validate(part)
    except pydantic.ValidationError as error:
        keys = ("the data", list(Data.model_fields))
        raise refusal("data", error, kind=DataError, keys=lambda _: keys) from None


def _check_writes(name: str, config: PreTrainedConfig, task: Task) -> None:
    """Raise DataError for an encoder, which reads texts only, and records without labels."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if task.kind in HEAD_KINDS or not encoder or config.to_dict().get("is_decoder"):
        return
    raise DataError(
        f"model {name}",
        found=f"a model of type {config.model_type}, which encodes texts and writes none, and {task.kind} records",
        rule="an encoder must be trained on texts with labels",
        fix="name a language model (Llama, Gemma, Qwen, ...), or data with the columns text and label",
    )


def _template(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, task: Task) -> tuple[str | None, str]:
    """Return the template that renders the conversations (None: the tokenizer's own), and why; ("", "") for others."""
    if task.kind != "chat" or "template" in task.split("train")[0]:
        return None, ""
    own = bool(tokenizer.chat_template)
    names = [*([None] if own else []), *TEMPLATES]
    records, problem = _spread(task.split("train"), 200), None
    for name in names:
        make = RowMaker(tokenizer, bool(config.is_encoder_decoder), 1 << 30)
        try:
            make.examples("chat", [{**record, "template": name} if name else record for record in records])
        except DataError as error:
            problem = problem or error
            continue
        if name is None:
            return None, "the tokenizer's chat template"
        reason = f"the tokenizer's own template refuses the data ({problem.found})" if own and problem else (
            "the tokenizer has no chat template"
        )  # fmt: skip
        return name, " ".join(f"{name}: {reason}".split())
    assert problem is not None
    raise problem


def _short(config: PreTrainedConfig, task: Task) -> bool:
    """Return whether the assistant's last turns are short enough to be compared with the model's answers."""
    if task.kind != "chat" or config.is_encoder_decoder:
        return False
    texts = [record["messages"][last_turn(record)].get("content") for record in _spread(task.split("train"), 200)]
    words = sorted(len(text.split()) if text else SHORT + 1 for text in texts)
    return words[math.ceil(0.95 * len(words)) - 1] <= SHORT


def _lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> _Lengths:
    """Tokenize the training records, or a sample of many with the longest of them, and return their lengths."""
    records = task.split("train")
    if len(records) > SAMPLE:
        longest = sorted(records, key=lambda record: len(str(record)))[-SAMPLE // 10 :]
        records = [*_spread(records, SAMPLE), *longest]
    both = bool(model.config.is_encoder_decoder)
    limit = length_limit(model, tokenizer, 1 << 20, records)
    make = RowMaker(tokenizer, both, limit, vocabulary_of(model))
    rows = make.examples(task.kind, records)
    widths = sorted(max(len(row["input_ids"]), _labelled(row) if both else 0) for row in rows)
    needed = max(_needed(task.kind, row, both) for row in rows)
    most = widths[math.ceil(0.95 * len(widths)) - 1]
    return _Lengths(most, widths[-1], needed, len(records), widths)


def _labelled(row: Example) -> int:
    return len(row["labels"]) if isinstance(row["labels"], list) else 0


def _needed(kind: str, row: Example, both: bool) -> int:
    """Return the tokens that a row must keep: its answer, or up to the assistant's first one; 2 where it may be cut."""
    if kind in HEAD_KINDS or kind == "text":
        return 2
    if both:
        return _labelled(row)
    counted = [at for at, label in enumerate(row["labels"]) if at > 0 and label != IGNORED]
    if kind == "chat":
        return counted[0] + 1
    return len(row["labels"]) if kind == "pairs" else len(counted) + 2


def _spread(records: Sequence[Record], number: int) -> list[Record]:
    """Return up to `number` records at equal distances."""
    step = max(1, len(records) // number)
    return list(records[::step][:number])


def _memory() -> tuple[int, str]:
    """Return the free bytes of the accelerator or of this machine, and which of them."""
    device = best_device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return free_memory(device), "free on " + ("this machine" if device.type in ("cpu", "mps") else where)


def _fitting(
    model: str, config: PreTrainedConfig, task: Task, max_length: int, budget: int, on_step: Callable[[str], object]
) -> _Setting:
    """Return the first setting whose predicted peak is within the budget."""
    on_gpu = best_device().type == "cuda"
    half = config.dtype in (torch.float16, torch.bfloat16)
    dtypes = ["float32", None] if half and not on_gpu else [None]  # processors compute float32 fastest
    least: _Setting | None = None
    number = min(BATCH, len(task.split("train")))
    longest = _longest(task)
    too_large: set[tuple[str, str | None]] = set()
    chains = dict.fromkeys(_closed(chain, config) for chain in _CHAINS)
    for chain, dtype, (batch_size, recomputed) in _settings(chains, dtypes, number):
        if (chain, dtype) in too_large:
            continue
        on_step(f"{chain}, batches of {batch_size}")
        try:
            made = plan(
                chain, model, task=longest, batch_size=batch_size, max_length=max_length, bf16=on_gpu, dtype=dtype,
                gradient_checkpointing=recomputed, num_labels=number_of_labels(task),
            )  # fmt: skip
        except DovetailError:
            if recomputed:  # the model may not support it
                continue
            raise
        if not made.legal or made.predicted_peak_memory_nbytes is None:
            continue
        if made.nbytes > budget:  # the weights alone, so no batch is small enough
            too_large.add((chain, dtype))
        found = _Setting(chain, batch_size, recomputed, dtype, made)
        if made.predicted_peak_memory_nbytes <= budget:
            return found
        if least is None or made.predicted_peak_memory_nbytes < (least.plan.predicted_peak_memory_nbytes or 0):
            least = found
    if least is None:
        rule, fix = "the model must have linear layers that a LoRA fits", "write the recipe by hand (docs/recipes.md)"
        raise DovetailError(f"model {model}", found="no chain that is legal on it", rule=rule, fix=fix)
    peak = size(least.plan.predicted_peak_memory_nbytes or 0)
    raise DovetailError(
        f"model {model}",
        found=f"{peak} with {least.chain} and one row of {max_length} tokens",
        rule=f"the training must fit in {percent(SHARE, 0)} of the memory, {size(budget)}",
        fix="name a smaller model, shorten the records, or plan for another machine with --memory 24GB",
    )


def _closed(chain: str, config: PreTrainedConfig) -> str:
    """Return a chain that keeps the zeros and the grid that a merged model has; one that is not legal unchanged."""
    had = held(config)
    try:
        return assign(chain, {}, had).chain.closed if had else chain
    except DovetailError:
        return chain


def _settings(
    chains: Iterable[str], dtypes: Sequence[str | None], number: int
) -> Iterator[tuple[str, str | None, tuple[int, bool]]]:
    """Yield chain, dtype and batch from the best to the smallest; a batch has at most `number` rows."""
    batches = dict.fromkeys((min(rows, number), recomputed) for rows, recomputed in _BATCHES)
    for chain in chains:
        for dtype in dtypes:
            for batch in batches:
                yield chain, dtype, batch


def _longest(task: Task) -> Task:
    """Return the task with its longest records only, by characters: a plan needs no others."""
    records = sorted(task.split("train"), key=lambda record: len(str(record)))[-4 * BATCH :]
    return replace(task, splits={"train": records})


def _scored_rows(model: PreTrainedModel, lengths: _Lengths, budget: int) -> int:
    """Return the rows of a batch whose logits, three times in float32, take half of the budget, at most 64."""
    vocabulary = vocabulary_of(model)
    outputs = vocabulary[1] if vocabulary is not None and model.can_generate() else 1
    rows = budget // (2 * 3 * 4 * outputs * min(1024, lengths.longest))
    return 2 ** int(math.log2(max(1, min(64, rows))))


def _data_said(part: Mapping[str, Any], task: Task) -> str:
    counts = ", ".join(f"{len(records):,} for {split}" for split, records in task.splits.items())
    return f"format {part['format']}, records: {counts}"


def _lengths_said(lengths: _Lengths, max_length: int, task: Task) -> str:
    sampled = len(task.split("train")) > SAMPLE
    of = f" (of a sample of {lengths.counted:,})" if sampled else ""
    said = f"95 % of the records have at most {lengths.most:,} tokens, the longest {lengths.longest:,}{of}"
    if not (over := lengths.over(max_length)):
        return said
    cut = dict.fromkeys(("generation", "choice"), "lose the beginning of the prompt")
    cut |= {"text": "continue in a further row", "chat": "lose their end"}
    return f"{said}; {over:,} records have more than {max_length:,} and {cut.get(task.kind, 'are cut')}"


def _chain_said(setting: _Setting) -> str:
    if "nf4" not in setting.chain:
        return ""
    return ", 4-bit weights because the full ones do not fit"


def _batch_said(setting: _Setting) -> str:
    steps = -(-BATCH // setting.batch_size)
    said = f"{setting.batch_size} rows" + (f", {steps} batches a step" if steps > 1 else "")
    return said + (", activations computed again (less memory, slower)" if setting.gradient_checkpointing else "")


def _text(
    model: str, part: Mapping[str, Any], task: Task, setting: _Setting, max_length: int, rows: int,
    facts: Mapping[str, str], weights: int, output: Path,
) -> str:  # fmt: skip
    """Return the recipe as YAML with comments."""
    folder = output.absolute().parent
    named = model
    if model != PLAYGROUND and not model.startswith("package:") and isinstance(resolve(model), Path):
        named = _relative(Path(model).expanduser().absolute(), folder)
    comments = {
        "train": f"{len(task.split('train')):,} records are trained",
        "format": "found by the columns of the first row (docs/data.md)",
        "split": "this share of the records, drawn by a seed, is kept for scoring",
        "template": facts.get("template", "").partition(": ")[2],
        "metric": "the answers are short, so they are generated and compared; or perplexity",
    }
    data = {
        key: _relative(Path(value), folder) if key in ("train", "validation", "test") else value
        for key, value in part.items()
    }
    steps = -(-BATCH // setting.batch_size)
    epochs = 1 if len(task.split("train")) > 20_000 else 3
    train: list[tuple[str, Any, str]] = [
        ("epochs", epochs, "passes over the records; or max_steps: 1000"),
        ("batch_size", setting.batch_size, facts["memory"]),
    ]
    if steps > 1:
        train.append(("gradient_accumulation", steps, f"{steps * setting.batch_size} rows in an optimizer step"))
    if setting.gradient_checkpointing:
        train.append(("gradient_checkpointing", True, "activations are computed again: less memory, slower"))
    if best_device().type == "cuda":
        train.append(("bf16", True, "the accelerator computes in bfloat16"))
    train.append(("max_length", max_length, facts["lengths"]))
    if weights < SMALL and task.kind not in HEAD_KINDS:
        train.append(("lr_scale", SMALL_SCALE, "a model this small takes larger learning rates"))
    train.append(("warmup", 0.05, "the learning rate rises over the first steps"))
    scored = task.splits.get("test" if "test" in part else "validation", ())
    evaluate: list[tuple[str, Any, str]] = [("batch_size", rows, "rows that are scored together")]
    if len(scored) > SCORED:
        evaluate.insert(0, ("limit", SCORED, f"of {len(scored):,} records, after each stage"))
    dtype = (
        [_line("dtype", setting.dtype, "stored in 16 bits; processors compute 32 bits faster")] if setting.dtype else []
    )
    name = str(part["name"])
    lines = [
        "# Written by dovetail init. Every key is explained in docs/recipes.md.",
        f"#   dovetail run {output.name} --output {choose_output(None, name)}",
        "",
        _line("model", named, facts["model"].rpartition(": ")[2]),
*dtype,
        "data:",
        *(_line(key, value, comments.get(key, ""), 2) for key, value in data.items()),
        "",
        *(f"# {line}" for line in _chain_about(setting.chain)),
        _line("chain", setting.chain, ""),
        "",
        "train:",
        *(_line(*entry, 2) for entry in train),
        "evaluate:",
        *(_line(*entry, 2) for entry in evaluate),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _chain_about(chain: str) -> list[str]:
    smaller = [
        "Half of the weights and 4 bits for the others, merged without loss:",
        "  wanda(0.5) >> int(bits=4, group=64) >> lora(r=16) >> remask >> regrid",
    ]
    if "nf4" in chain:
        return ["The base in 4 bits and a LoRA on its grid, which is merged without loss.", *smaller]
    if ">>" in chain:
        return ["A LoRA that keeps the zeros and the grid of the merged model, and is merged without loss."]
    return ["A LoRA on the full weights, merged at the end.", *smaller]


def _relative(path: Path, folder: Path) -> str:
    """Return a path as seen from a folder; absolute where the way leads out of it by more than two levels."""
    found = os.path.relpath(path, folder)
    if found.startswith(os.path.join("..", "..", "..")):
        return str(path)
    return found if (found not in (PLAYGROUND,) and os.sep in found) or Path(found).suffix else f"./{found}"


def _line(key: str, value: Any, comment: str, indent: int = 0) -> str:
    """Return a line of YAML with its comment, which starts in one column where there is room."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    line = f"{' ' * indent}{key}: {text.strip().removesuffix('...').rstrip()}"
    note = " ".join(comment.split())
    return f"{line:<40}  # {note}" if note else line
