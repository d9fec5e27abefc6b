"""The label table: from module paths to the roles that layers play (CLAM's GenericTransformer), family by family."""

from __future__ import annotations

LABELS = ("query", "key", "value", "output", "gate", "up", "down")
ALL_LINEAR = "all-linear"
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
    # Phi-3
    ("qkv_proj", _QKV),
    ("gate_up_proj", ("gate", "up")),
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

# What transformers calls the parts after the last block, as direct children of a PreTrainedModel.
HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "cls",
        "generator_predictions",
        "score",
        "classifier",
        "pre_classifier",
        "classification_head",
        "qa_outputs",
        "pooler",
        "sequence_summary",
        "logits_proj",
        "vocab_projector",
        "vocab_transform",
        "predictions",
        "multiple_choice_head",
        "summary",
    }
)
