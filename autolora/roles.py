"""The role and the depth of a module, from its dotted name alone. No torch.

Names are compared segment by segment, never by substring: ``monkey`` is not a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TypeVar

Number = TypeVar("Number", int, float)


class Role(StrEnum):
    """What a linear map does in a transformer block."""

    query = "query"
    key = "key"
    value = "value"
    fused_qkv = "fused_qkv"
    attention_output = "attention_output"
    mlp_up = "mlp_up"
    mlp_gate = "mlp_gate"
    mlp_down = "mlp_down"
    head = "head"
    other = "other"


ROLE_ORDER: tuple[Role, ...] = tuple(Role)
"""Roles in the order of the data flow through a block: the order of rows in tables."""

# A module of one of these names is a task head, and so is everything inside it. Poolers and other layers between
# encoder and classifier (DistilBERT's pre_classifier, ModernBERT's head.dense) are adapted like the encoder: `other`.
HEADS = frozenset(
    {
        "classifier",
        "classification_head",
        "score",
        "logits_proj",
        "qa_outputs",
        "lm_head",
        "cls",
        "generator_predictions",
        "generator_lm_head",
        "discriminator_predictions",
        "vocab_transform",
        "vocab_projector",
        "multiple_choice_head",
        "proj_out",
    }
)

# Dotted suffix -> role; the first row that matches wins.
SUFFIXES: tuple[tuple[str, Role], ...] = (
    # BERT, RoBERTa, ELECTRA, DeBERTa, ViT before transformers 5
    ("query", Role.query),
    ("key", Role.key),
    ("value", Role.value),
    ("attention.output.dense", Role.attention_output),
    ("intermediate.dense", Role.mlp_up),
    ("output.dense", Role.mlp_down),
    # DeBERTa: v1 fuses the content projections; positions have a query and a key of their own
    ("self.in_proj", Role.fused_qkv),
    ("self.pos_q_proj", Role.query),
    ("self.pos_proj", Role.key),
    ("query_proj", Role.query),
    ("key_proj", Role.key),
    ("value_proj", Role.value),
    ("pos_query_proj", Role.query),
    ("pos_key_proj", Role.key),
    # DistilBERT
    ("q_lin", Role.query),
    ("k_lin", Role.key),
    ("v_lin", Role.value),
    ("out_lin", Role.attention_output),
    ("ffn.lin1", Role.mlp_up),
    ("ffn.lin2", Role.mlp_down),
    # MPNet
    ("attn.q", Role.query),
    ("attn.k", Role.key),
    ("attn.v", Role.value),
    ("attn.o", Role.attention_output),
    # ModernBERT: Wi holds the up and the gate half of a gated MLP
    ("Wqkv", Role.fused_qkv),
    ("attn.Wo", Role.attention_output),
    ("mlp.Wi", Role.mlp_up),
    ("mlp.Wo", Role.mlp_down),
    # GPT-2; in cross-attention c_attn is the fused key and value
    ("c_attn", Role.fused_qkv),
    ("q_attn", Role.query),
    ("attn.c_proj", Role.attention_output),
    ("crossattention.c_proj", Role.attention_output),
    ("mlp.c_fc", Role.mlp_up),
    ("mlp.c_proj", Role.mlp_down),
    # Llama, Qwen, Whisper, ViT, and the many that follow them
    ("q_proj", Role.query),
    ("k_proj", Role.key),
    ("v_proj", Role.value),
    ("o_proj", Role.attention_output),
    ("out_proj", Role.attention_output),
    ("gate_proj", Role.mlp_gate),
    ("up_proj", Role.mlp_up),
    ("down_proj", Role.mlp_down),
    ("fc1", Role.mlp_up),
    ("fc2", Role.mlp_down),
    # T5: in the gated form wi_0 goes through the activation and wi_1 does not
    *((f"{attention}.q", Role.query) for attention in ("SelfAttention", "EncDecAttention")),
    *((f"{attention}.k", Role.key) for attention in ("SelfAttention", "EncDecAttention")),
    *((f"{attention}.v", Role.value) for attention in ("SelfAttention", "EncDecAttention")),
    *((f"{attention}.o", Role.attention_output) for attention in ("SelfAttention", "EncDecAttention")),
    ("DenseReluDense.wi", Role.mlp_up),
    ("DenseReluDense.wi_0", Role.mlp_gate),
    ("DenseReluDense.wi_1", Role.mlp_up),
    ("DenseReluDense.wo", Role.mlp_down),
)


def role_of(name: str) -> Role:
    """The role of the module with this dotted name; ``other`` if no row of the table matches."""
    if not HEADS.isdisjoint(name.split(".")):
        return Role.head
    dotted = "." + name
    return next((role for suffix, role in SUFFIXES if dotted.endswith("." + suffix)), Role.other)


def depth_of(name: str) -> int | None:
    """Index of the block that a module is in, counted from 0 in its own stack; ``None`` outside the blocks.

    It is the first number in the name: T5's ``encoder.block.3.layer.1`` is at depth 3. An encoder and a decoder are
    counted separately, so depth 0 is the first block of each.
    """
    if role_of(name) is Role.head:
        return None
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def outermost_heads(names: Iterable[str]) -> list[str]:
    """The task heads among these module names, without the modules inside them."""
    heads = [name for name in names if role_of(name) is Role.head]
    return [name for name in heads if not any(name.startswith(other + ".") for other in heads)]


def rank_grid(ranks: Mapping[str, Number]) -> tuple[list[str], list[str], dict[tuple[str, str], Number]]:
    """Ranks, or other numbers, as a grid: labels of rows and columns, and what each (row, column) that occurs has.

    Rows are the roles that occur, columns the depths ("-" for none, last); modules that share a cell add up. Where
    names say no role at all, as in a planted regression, every module has a column of its own.
    """
    if all(role_of(name) is Role.other for name in ranks):
        return ["rank"], list(ranks), {("rank", name): rank for name, rank in ranks.items()}
    cells: dict[tuple[str, str], Number] = {}
    for name, rank in ranks.items():
        depth = depth_of(name)
        cell = (role_of(name).value, "-" if depth is None else str(depth))
        cells[cell] = cells.get(cell, 0) + rank
    columns: set[str] = {column for _, column in cells}
    roles = [role.value for role in ROLE_ORDER if any(row == role.value for row, _ in cells)]
    return roles, [*sorted(columns - {"-"}, key=int), *(columns & {"-"})], cells


def mean_cells(values: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """The cells of :func:`rank_grid` with the mean of the modules that share one."""
    sums, counts = rank_grid(values)[2], rank_grid(dict.fromkeys(values, 1))[2]
    return {cell: total / counts[cell] for cell, total in sums.items()}
