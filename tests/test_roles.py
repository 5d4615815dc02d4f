"""Roles and depths of every linear map of tiny, randomly initialised models of each family."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import transformers as hf
from torch import nn

from autolora.roles import ROLE_ORDER, SUFFIXES, Role, depth_of, mean_cells, role_of

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
GROUPED = {**BASE, "num_key_value_heads": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def block(prefix: str, **roles: str) -> dict[str, str]:
    """``{prefix.leaf: role}`` from ``role="leaf another_leaf"``."""
    return {f"{prefix}.{leaf}": role for role, leaves in roles.items() for leaf in leaves.split()}


def bert_like(prefix: str) -> dict[str, str]:
    return block(
        f"{prefix}.encoder.layer.*",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        mlp_up="intermediate.dense",
        mlp_down="output.dense",
    )


def llama_like() -> dict[str, str]:
    return block(
        "model.layers.*",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_output="self_attn.o_proj",
        mlp_gate="mlp.gate_proj",
        mlp_up="mlp.up_proj",
        mlp_down="mlp.down_proj",
    )


def deberta_v1() -> dict[str, str]:
    return block(
        "deberta.encoder.layer.*",
        fused_qkv="attention.self.in_proj",
        key="attention.self.pos_proj",
        query="attention.self.pos_q_proj",
        attention_output="attention.output.dense",
        mlp_up="intermediate.dense",
        mlp_down="output.dense",
    )


def deberta_v2() -> dict[str, str]:
    return block(
        "deberta.encoder.layer.*",
        query="attention.self.query_proj attention.self.pos_query_proj",
        key="attention.self.key_proj attention.self.pos_key_proj",
        value="attention.self.value_proj",
        attention_output="attention.output.dense",
        mlp_up="intermediate.dense",
        mlp_down="output.dense",
    )


def distilbert() -> dict[str, str]:
    return block(
        "distilbert.transformer.layer.*",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        mlp_up="ffn.lin1",
        mlp_down="ffn.lin2",
    )


def mpnet() -> dict[str, str]:
    return block(
        "mpnet.encoder.layer.*",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        mlp_up="intermediate.dense",
        mlp_down="output.dense",
    )


def modernbert() -> dict[str, str]:
    leaves = block("model.layers.*", fused_qkv="attn.Wqkv", attention_output="attn.Wo", mlp_up="mlp.Wi")
    return {**leaves, "model.layers.*.mlp.Wo": "mlp_down", "head.dense": "other"}


def gpt2(cross: bool = False) -> dict[str, str]:
    leaves = block(
        "transformer.h.*",
        fused_qkv="attn.c_attn",
        attention_output="attn.c_proj",
        mlp_up="mlp.c_fc",
        mlp_down="mlp.c_proj",
    )
    extra = block("transformer.h.*.crossattention", fused_qkv="c_attn", query="q_attn", attention_output="c_proj")
    return {**leaves, **(extra if cross else {})}


def t5(prefix: str = "", gated: bool = False) -> dict[str, str]:
    up = (
        {"mlp_gate": "DenseReluDense.wi_0", "mlp_up": "DenseReluDense.wi_1"}
        if gated
        else {"mlp_up": "DenseReluDense.wi"}
    )
    leaves: dict[str, str] = {}
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        inside = f"{prefix}{stack}.block.*.layer.*"
        for attention in attentions:
            leaves |= block(f"{inside}.{attention}", query="q", key="k", value="v", attention_output="o")
        leaves |= block(inside, mlp_down="DenseReluDense.wo", **up)
    return leaves


def vit(prefix: str) -> dict[str, str]:
    return block(
        f"{prefix}layers.*",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        attention_output="attention.o_proj",
        mlp_up="mlp.fc1",
        mlp_down="mlp.fc2",
    )


def whisper(stack: str, *attentions: str) -> dict[str, str]:
    leaves = block(f"{stack}.layers.*", mlp_up="fc1", mlp_down="fc2")
    for attention in attentions:
        leaves |= block(
            f"{stack}.layers.*.{attention}",
            query="q_proj",
            key="k_proj",
            value="v_proj",
            attention_output="out_proj",
        )
    return leaves


def heads(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "head")


def others(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "other")


ROBERTA_HEAD = heads("classifier.dense", "classifier.out_proj")
MLM_HEAD = heads("cls.predictions.transform.dense", "cls.predictions.decoder")
ELECTRA_IN = others("electra.embeddings_project")

FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BASE)),
        {**bert_like("bert"), **others("bert.pooler.dense"), **heads("classifier")},
    ),
    "bert-pretraining": (
        lambda: hf.BertForPreTraining(hf.BertConfig(**BASE)),
        {**bert_like("bert"), **others("bert.pooler.dense"), **MLM_HEAD, **heads("cls.seq_relationship")},
    ),
    "bert-qa": (
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BASE)),
        {**bert_like("bert"), **heads("qa_outputs")},
    ),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BASE)),
        {**bert_like("roberta"), **ROBERTA_HEAD},
    ),
    "roberta-mlm": (
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BASE)),
        {**bert_like("roberta"), **heads("lm_head.dense", "lm_head.decoder")},
    ),
    "deberta-v1": (
        lambda: hf.DebertaForSequenceClassification(hf.DebertaConfig(**BASE, **RELATIVE)),
        {**deberta_v1(), **others("pooler.dense"), **heads("classifier")},
    ),
    "deberta-v2": (
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**BASE, **RELATIVE, share_att_key=False)),
        {**deberta_v2(), **others("pooler.dense"), **heads("classifier")},
    ),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)),
        {**distilbert(), **others("pre_classifier"), **heads("classifier")},
    ),
    "distilbert-mlm": (
        lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTIL)),
        {**distilbert(), **heads("vocab_transform", "vocab_projector")},
    ),
    "electra": (
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BASE, embedding_size=16)),
        {**bert_like("electra"), **ELECTRA_IN, **ROBERTA_HEAD},
    ),
    "electra-discriminator": (
        lambda: hf.ElectraForPreTraining(hf.ElectraConfig(**BASE, embedding_size=16)),
        {
            **bert_like("electra"),
            **ELECTRA_IN,
            **heads("discriminator_predictions.dense", "discriminator_predictions.dense_prediction"),
        },
    ),
    "electra-generator": (
        lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**BASE, embedding_size=16)),
        {**bert_like("electra"), **ELECTRA_IN, **heads("generator_predictions.dense", "generator_lm_head")},
    ),
    "mpnet": (
        lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**BASE)),
        {**mpnet(), **ROBERTA_HEAD},
    ),
    "modernbert": (
        lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**BASE)),
        {**modernbert(), **heads("classifier")},
    ),
    "gpt2": (
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)),
        {**gpt2(), **heads("score")},
    ),
    "gpt2-cross": (
        lambda: hf.GPT2DoubleHeadsModel(hf.GPT2Config(**GPT2, add_cross_attention=True)),
        {**gpt2(cross=True), **heads("lm_head", "multiple_choice_head.summary")},
    ),
    "llama": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED)),
        {**llama_like(), **heads("score")},
    ),
    "qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
        {**llama_like(), **heads("lm_head")},
    ),
    "qwen3": (
        lambda: hf.Qwen3ForSequenceClassification(hf.Qwen3Config(**GROUPED, head_dim=16)),
        {**llama_like(), **heads("score")},
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        {**t5(), **heads("lm_head")},
    ),
    "t5-gated": (
        lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
        {**t5("transformer.", gated=True), **heads("classification_head.dense", "classification_head.out_proj")},
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
        {**vit("vit."), **heads("classifier")},
    ),
    "vit-bare": (lambda: hf.ViTModel(hf.ViTConfig(**VIT)), {**vit(""), **others("pooler.dense")}),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        {
            **whisper("model.encoder", "self_attn"),
            **whisper("model.decoder", "self_attn", "encoder_attn"),
            **heads("proj_out"),
        },
    ),
    "whisper-audio": (
        lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**WHISPER)),
        {**whisper("encoder", "self_attn"), **others("projector"), **heads("classifier")},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_family_has_its_role_and_depth(family: str) -> None:
    build, expected = FAMILIES[family]
    seen: dict[str, set[int | None]] = {}
    for name, module in build().named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            kind = re.sub(r"\.\d+\.", ".*.", name)
            assert role_of(name) == expected[kind], name
            seen.setdefault(kind, set()).add(depth_of(name))
    assert seen == {kind: {0, 1} if "*" in kind else {None} for kind in expected}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("monkey", Role.other),
        ("layer.0.monkey", Role.other),
        ("layer.0.subquery", Role.other),
        ("layer.0.prefc1", Role.other),
        ("my_classifier", Role.other),
        ("query", Role.query),
        ("vit.encoder.layer.3.attention.attention.query", Role.query),
        ("encoder.layer.0.output.dense", Role.mlp_down),
        ("encoder.layer.0.attention.output.dense", Role.attention_output),
        ("encoder.layer.0.attention.output", Role.other),
        ("base_model.model.classifier.out_proj", Role.head),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", Role.other),
        ("decoder", Role.other),
        ("", Role.other),
    ],
)
def test_names_are_matched_by_whole_segments(name: str, role: Role) -> None:
    assert role_of(name) is role


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("decoder.block.7.layer.2.DenseReluDense.wi_0", 7),
        ("bert.encoder.layer.11.output.dense", 11),
        ("layer4.query", None),
        ("bert.pooler.dense", None),
        ("classifier.0", None),
    ],
)
def test_depth_is_the_first_number(name: str, depth: int | None) -> None:
    assert depth_of(name) == depth


def test_no_row_of_the_table_is_shadowed_by_an_earlier_one() -> None:
    for suffix, role in SUFFIXES:
        assert role_of(suffix) is role


def test_roles_are_the_agreed_ten() -> None:
    assert " ".join(ROLE_ORDER) == ("query key value fused_qkv attention_output mlp_up mlp_gate mlp_down head other")


def test_roles_do_not_import_torch() -> None:
    code = "import sys, autolora.roles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_that_share_a_cell_are_averaged() -> None:
    values = {"encoder.0.query": 1.0, "decoder.0.query": 2.0, "encoder.1.key": 5.0}
    assert mean_cells(values) == {("query", "0"): 1.5, ("key", "1"): 5.0}
