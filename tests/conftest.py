"""Shared fixtures: everything is offline, and models are tiny and made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers that run side by side would wait for each other's threads
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import string
from pathlib import Path

import pytest

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """
a about after all an and are at bad big bird black boy brown by car cat child children city dog door eat eats every few
film fish for found from girl give good great green happy has have he her here his house how in into is it jump jumps
king like likes little long love man many men more most movie never new no nobody none not of old on one open or other
out over paper people play plays queen quick rain read red river road run runs sad said saw school sea see she ship shop
sing sings sky sleep sleeps slow small snow some song street sun table take than that the their there they this three to
town train tree two under up very walk walks wall was water we well went were what when where which white who why will
wind window with woman women word work write year yellow you young
"""


def write_tokenizer(directory: Path) -> int:
    """A lower-case WordPiece tokenizer that knows every ASCII character; gives the size of its vocabulary."""
    from transformers import BertTokenizer

    characters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    pieces = [f"##{c}" for c in characters if c.isalnum()] + ["##s", "##ing", "##ed", "##er", "##ly"]
    vocabulary = list(dict.fromkeys([*SPECIAL, *characters, *pieces, *WORDS.split()]))
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, model_max_length=512)
    tokenizer.save_pretrained(directory)
    return len(vocabulary)


def write_bert(directory: Path, spread: float = 0.02) -> Path:
    """A randomly initialised BERT (2 layers, width 32, 512 positions) and a tokenizer for ASCII text.

    ``spread`` is the standard deviation of the weights: with the usual one all texts look nearly the same to it.
    """
    import torch
    from transformers import BertConfig, BertModel

    size = write_tokenizer(directory)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=spread,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a randomly initialised BERT (2 layers, width 32, 512 positions) and a tokenizer for ASCII text."""
    return write_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def varied_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on MNLI with modules of rank 0 that predicts every class: not to be changed."""
    from small_runs import ran

    folder = tmp_path_factory.mktemp("varied")
    (folder / "bert").mkdir()
    backbone = write_bert(folder / "bert", spread=0.3)
    return ran(folder / "runs", "task=mnli", "strategy=autolora", "budget.rank=1", f"backbone.path={backbone}")
