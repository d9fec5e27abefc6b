"""The labels of layers: what a layer does, told by the end of its path.

ROLES is the whole table; the first pattern that fits the end of a layer's path decides.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

LABELS = ("query", "key", "value", "output", "gate", "up", "down")
_QKV = ("query", "key", "value")

# End of the module path -> roles, first match wins. Patterns are globs over the dotted path and fit whole names.
ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Llama, Mistral, Qwen, Gemma, most decoders since; OPT and BART name query, key and value the same way
    ("q_proj", ("query",)),
    ("k_proj", ("key",)),
    ("v_proj", ("value",)),
    ("o_proj", ("output",)),
    ("gate_proj", ("gate",)),
    ("up_proj", ("up",)),
    ("down_proj", ("down",)),
    # Multi-head latent attention (DeepSeek, MiniCPM3): low-rank factors of the query, and of key and value
    ("q_a_proj", ("query",)),
    ("q_b_proj", ("query",)),
    ("kv_a_proj_with_mqa", ("key", "value")),
    ("kv_b_proj", ("key", "value")),
    # JetMoE
    ("kv_proj", ("key", "value")),
    # Phi-3
    ("qkv_proj", _QKV),
    ("gate_up_proj", ("gate", "up")),
    # MoE experts in three-dimensional parameters, by number
    ("experts.gate_up_proj.*", ("gate", "up")),
    ("experts.up_proj.*", ("up",)),
    ("experts.down_proj.*", ("down",)),
    # JetMoE: experts of the attention, then of the feed-forward network
    ("experts.input_linear.weight.*", ("query",)),
    ("experts.output_linear.weight.*", ("output",)),
    ("input_linear.weight.*", ("gate", "up")),
    ("output_linear.weight.*", ("down",)),
    # LFM2
    ("feed_forward.w1", ("gate",)),
    ("feed_forward.w3", ("up",)),
    ("feed_forward.w2", ("down",)),
    # Granite's shared experts; JetMoE and GraniteMoe call their experts so too
    ("input_linear", ("gate", "up")),
    ("output_linear", ("down",)),
    # GPT-J
    ("mlp.fc_in", ("up",)),
    ("mlp.fc_out", ("down",)),
    # MPT
    ("attn.Wqkv", _QKV),
    # Qwen3-Next's linear attention: z gates the output
    ("linear_attn.in_proj_qkvz", (*_QKV, "gate")),
    # RecurrentGemma's recurrent block: y gates the recurrence of x
    ("temporal_block.linear_x", ("value",)),
    ("temporal_block.linear_y", ("gate",)),
    ("temporal_block.linear_out", ("output",)),
    # Mamba, Falcon-Mamba, Jamba, Bamba: x and z, then B (as a key) and C (as a query)
    ("mixer.in_proj", ("value", "gate")),
    ("mamba.in_proj", ("value", "gate")),
    ("mixer.x_proj", ("query", "key")),
    ("mamba.x_proj", ("query", "key")),
    ("mixer.out_proj", ("output",)),
    ("mamba.out_proj", ("output",)),
    # OPT, BART (self_attn, encoder_attn); Phi and CLIP keep their fc1 and fc2 in `mlp`
    ("*attn.out_proj", ("output",)),
    ("layers.*.fc1", ("up",)),
    ("layers.*.fc2", ("down",)),
    # GPT-2: c_proj is the attention's output or the feed-forward's, as its parent says
    ("crossattention.c_attn", ("key", "value")),
    ("crossattention.q_attn", ("query",)),
    ("crossattention.c_proj", ("output",)),
    ("attn.c_attn", _QKV),
    ("attn.c_proj", ("output",)),
    ("mlp.c_fc", ("up",)),
    ("mlp.c_proj", ("down",)),
    # GPT-NeoX, BLOOM, Falcon
    ("query_key_value", _QKV),
    ("attention.dense", ("output",)),
    ("self_attention.dense", ("output",)),
    ("dense_h_to_4h", ("up",)),
    ("dense_4h_to_h", ("down",)),
    # T5, self- and cross-attention; wi_0 is the gated half that passes the activation
    ("*Attention.q", ("query",)),
    ("*Attention.k", ("key",)),
    ("*Attention.v", ("value",)),
    ("*Attention.o", ("output",)),
    ("DenseReluDense.wi", ("up",)),
    ("DenseReluDense.wi_0", ("gate",)),
    ("DenseReluDense.wi_1", ("up",)),
    ("DenseReluDense.wo", ("down",)),
    # BERT, RoBERTa, MiniLM: the attention's output.dense must be read before the feed-forward's
    ("attention.self.query", ("query",)),
    ("attention.self.key", ("key",)),
    ("attention.self.value", ("value",)),
    ("attention.output.dense", ("output",)),
    ("intermediate.dense", ("up",)),
    ("output.dense", ("down",)),
    # DistilBERT
    ("q_lin", ("query",)),
    ("k_lin", ("key",)),
    ("v_lin", ("value",)),
    ("out_lin", ("output",)),
    ("ffn.lin1", ("up",)),
    ("ffn.lin2", ("down",)),
)

CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"})
"""What transformers calls an attention whose keys and values read another input than its queries."""


def roles_of(path: str) -> tuple[str, ...]:
    """Return the labels of a layer with this path, by ROLES; none for a path that is not in the table.

    >>> roles_of("model.layers.0.self_attn.qkv_proj")
    ('query', 'key', 'value')
    """
    return next((roles for pattern, roles in ROLES if path_matches(path, pattern)), ())


def path_matches(name: str, pattern: str) -> bool:
    """Return whether a glob fits a path or the end of one, in whole names."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
