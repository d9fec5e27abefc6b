"""What a model and its tokenizer have for tokens: rows, the tokens that pad and end a text, and a head for a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from dovetail.errors import DataError
from dovetail.tasks.task import HEAD_KINDS, Record, check_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Vocabulary = tuple[int, int]
"""Rows of the embedding, which bound the ids of inputs, and outputs of the head, which bound those of labels."""


def vocabulary_of(model: nn.Module) -> Vocabulary | None:
    """Return the sizes that bound token ids; None for a model without an embedding of tokens."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return None
    rows = next((p.shape[0] for p in embedding.parameters()), None)
    if rows is None:
        return None
    outputs = getattr(head, "out_features", None)
    return rows, rows if outputs is None else outputs


def pad_id(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary | None = None) -> int:
    """Return the tokenizer's padding token, else its end token, else 0; the attention mask hides it.

    vocabulary   the model's; a token without a row in its embedding is passed over
    """
    rows = None if vocabulary is None else vocabulary[0]
    tokens: tuple[Any, Any] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return first_of(*(at for at in tokens if at is not None and (rows is None or at < rows))) or 0


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a text, or None."""
    return first_of(tokenizer.eos_token_id)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: Sequence[int | None] = ()) -> list[int]:
    """Return the tokens at which an answer ends: the model's own, the tokenizer's, which is trained, and `turns`.

    turns   the tokens that end a turn of the assistant
    """
    own: Any = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    return sorted({at for at in (end_id(tokenizer), *ends, *turns) if at is not None})


def keep_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: Sequence[int | None] = ()) -> None:
    """Write `end_ids` to the model's generation config, so that `generate` stops where a scored answer stops."""
    if model.can_generate():
        ends = end_ids(model, tokenizer, turns)
        own: Any = model.generation_config.eos_token_id
        if ends and ends not in ([own], own):
            model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


def wrong_model(name: str, model: nn.Module, *, head: str = "") -> DataError:
    """Return the error for a model without the head that a task needs: of the kind `head`, or a language model's."""
    if head:
        rule, fix = "the model must have a head over texts", f'load the model with a head: task_kind="{head}"'
    else:
        rule, fix = "the model must be a language model", "load the model without a classification head"
    return DataError(f"task {name}", found=f"a {type(model).__name__}", rule=rule, fix=fix)


def check_model(name: str, kind: str, records: Sequence[Record], model: nn.Module) -> None:
    """Raise DataError for a model that cannot learn or answer a task of this kind.

    A task with labels needs a head over texts that has an output for every label, and a padding token. The other tasks
    need a model without such a head.
    """
    from transformers import PreTrainedModel

    config: Any = model.config
    where = f"task {name}"
    if kind not in HEAD_KINDS:
        if type(model).__name__.endswith("ForSequenceClassification"):
            raise wrong_model(name, model)
        return
    if isinstance(model, PreTrainedModel) and model.can_generate():
        raise wrong_model(name, model, head=kind)
    if kind == "classification":
        check_labels(where, records, config.num_labels, fix="load the model with the right num_labels")
    elif config.num_labels != 1:
        found, rule = f"a head of {config.num_labels} outputs", "a regression head must have 1 output"
        raise DataError(where, found=found, rule=rule, fix="load the model with num_labels=1")
    if config.pad_token_id is None:
        rule, fix = "a head over texts needs a padding token", "set model.config.pad_token_id = tokenizer.pad_token_id"
        raise DataError(where, found="config.pad_token_id=None", rule=rule, fix=fix)


def first_of(*tokens: object) -> int | None:
    """Return the first of the tokens that the tokenizer has."""
    return next((token for token in tokens if isinstance(token, int)), None)
