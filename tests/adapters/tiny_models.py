"""Tiny, randomly initialised models of the families that adapters have to fit, and an input for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn

BASE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {k: v for k, v in BASE.items() if "dropout" not in k} | {"num_key_value_heads": 1}
DISTILBERT = {
    "vocab_size": 64,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "num_labels": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "pad_token_id": 0,
    "num_labels": 3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
WHISPER = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "classifier_proj_size": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_labels": 3,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}

# family -> how to make the model, the number of Linears that all-linear adapts, the head
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, str | None]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**BASE)), 13, "classifier"),
    "roberta": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BASE)), 12, "classifier"),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTILBERT)),
        13,
        "classifier",
    ),
    "deberta_v2": (
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**BASE, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=16)
        ),
        17,
        "classifier",
    ),
    "electra": (
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BASE, embedding_size=8)),
        13,
        "classifier",
    ),
    "gpt2": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)), 8, "score"),
    "llama": (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA)), 14, "score"),
    "t5_encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), 12, None),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)), 12, "classifier"),
    "whisper_audio": (lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**WHISPER)), 13, "classifier"),
    # What predicts tokens has a head that is neither adapted nor trained.
    "whisper": (lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)), 22, None),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_decoder_layers=1, decoder_start_token_id=0)),
        22,
        None,
    ),
    "gpt2_lm": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), 8, None),
    "llama_lm": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), 14, None),
}
TASKS = {
    "vit": None, "t5_encoder": None, "whisper_audio": None, "whisper": None, "t5": "SEQ_2_SEQ_LM",
    "gpt2_lm": "CAUSAL_LM", "llama_lm": "CAUSAL_LM",
}  # fmt: skip
"""What PEFT calls the task of a family; that of the others is ``SEQ_CLS``."""


def make(family: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return FAMILIES[family][0]().eval()


@torch.no_grad()
def enlarged(model: nn.Module) -> nn.Module:
    """The model with matrices so large that its attention attends, and every adapter shows in the logits."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(0.3 / parameter.std())
    return model


def inputs_for(family: str, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(1, 64, (rows, 7), generator=generator)
    if family.startswith("whisper"):
        sound = {"input_features": torch.randn(rows, 8, 20, generator=generator)}
        return sound if family == "whisper_audio" else sound | {"decoder_input_ids": ids}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"decoder_input_ids": ids.flip(1)} if family == "t5" else batch


def labels_for(family: str, rows: int = 3) -> Tensor:
    """Classes of the rows, or tokens to predict."""
    generator = torch.Generator().manual_seed(3)
    tokens = family in ("whisper", "t5", "gpt2_lm", "llama_lm")
    return torch.randint(1, 64, (rows, 7), generator=generator) if tokens else torch.arange(rows) % 3


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(**batch)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def randomize(adapters: object, seed: int = 2) -> None:
    """Give every B gaussian entries, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters.layers.values():  # type: ignore[attr-defined]
        with torch.no_grad():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))


class Shared(nn.Module):
    """One Linear under three names, two of them in one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.inner = nn.Sequential(self.first, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.again(self.first(x).tanh()).tanh())
