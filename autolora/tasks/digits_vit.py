"""A small vision transformer, pretrained on the digits 0 to 4: ``python -m autolora.tasks.digits_vit`` makes it.

It is made when it is first needed, in seconds, and kept in the cache. On one machine the weights are a function of the
recipe and the versions; results on other machines are of other weights, and say so by their fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.files import replacing_directory
from autolora.paths import cache_root
from autolora.tasks.digits import pixel_values, pretraining

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

ARCHITECTURE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 5,
}
RECIPE: dict[str, Any] = {"epochs": 15, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.01, "seed": 0}


def pretrained() -> Path:
    """The folder of the model, as transformers reads it; made now if it is not there."""
    import torch
    import transformers

    about = [ARCHITECTURE, RECIPE, torch.__version__, transformers.__version__]
    folder = cache_root() / "digits_vit" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    if not (folder / "config.json").is_file():
        model = pretrain()
        with replacing_directory(folder) as new:
            model.save_pretrained(new)
    return folder


def pretrain() -> ViTForImageClassification:
    """Train from scratch with AdamW, the rate up and down once; on one thread, for equal weights.

    The global random state is as before.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import ViTConfig, ViTForImageClassification

    rows, threads = pretraining(), torch.get_num_threads()
    images, labels = pixel_values(rows.inputs, 8, 1), torch.tensor(rows.labels)
    steps = RECIPE["epochs"] * -(-len(rows) // RECIPE["batch_size"])
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(RECIPE["seed"])
            model = ViTForImageClassification(ViTConfig(**ARCHITECTURE)).train()
            optimizer = torch.optim.AdamW(model.parameters(), RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["lr"], steps)
            for _ in range(RECIPE["epochs"]):
                for batch in torch.randperm(len(rows)).split(RECIPE["batch_size"]):
                    optimizer.zero_grad()
                    cross_entropy(model(pixel_values=images[batch]).logits, labels[batch]).backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


if __name__ == "__main__":
    print(pretrained())
