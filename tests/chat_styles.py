"""Chat templates of six styles, written as the models' own are, with a tokenizer that has their special tokens.

Each style names how a turn of the assistant reads in the text, as a check that does not use the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from small_tokenizers import TOKENIZERS

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}"
    "{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\nTools:\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' }}{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    """{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson """
    "+ '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
REASONING = (  # Qwen3: the last turn has a block for the reasoning, earlier turns have none
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TAGGED = (  # depends on the number of messages, and tags what the assistant says
    "{{- '<|im_start|>' + messages | length | string + '\n' }}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content }}{% endgeneration %}"
    "{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Style:
    """A chat template, its special tokens, how a turn of the assistant reads, and whether it takes a system prompt."""

    template: str
    tokens: tuple[str, ...]
    turn: Callable[[str], str]
    system: bool = True
    kind: str = "bytes_bpe"


STYLES = {
    "ChatML": Style(CHATML, ("<|im_start|>", "<|im_end|>"), lambda text: f"{text}<|im_end|>"),
    "Llama 3": Style(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), lambda text: f"{text}<|eot_id|>"
    ),
    "Gemma": Style(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), lambda text: f"{text}<end_of_turn>", system=False, kind="pieces"
    ),
    "Mistral": Style(MISTRAL, ("[INST]", "[/INST]"), lambda text: f" {text}</s>", system=False),
    "Phi": Style(PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), lambda text: f"{text}<|end|>"),
    "tools": Style(TOOLS, ("<|im_start|>", "<|im_end|>"), lambda text: f"{text}<|im_end|>"),
}


def tokenizer_of(style: Style, kind: str | None = None) -> Any:
    """Return a tokenizer with the template and the special tokens of a style."""
    tokenizer = TOKENIZERS[kind or style.kind]()
    more: Any = {"additional_special_tokens": list(style.tokens)}
    tokenizer.add_special_tokens(more)
    tokenizer.chat_template = style.template
    return tokenizer
