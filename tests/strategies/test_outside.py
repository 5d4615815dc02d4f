"""Methods outside LoRA: what is trained, what stays, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters.tiny_models import inputs_for, make, output, snapshot
from safetensors.torch import load_file
from test_resume import Stopper, interrupted_run, outcome, stopper  # noqa: F401  fixture
from test_run import configure, directory_of, sst2  # noqa: F401  fixtures
from torch import Tensor, nn
from torch.optim import AdamW

from autolora.adapters import AdapterSettings
from autolora.adapters.whole import WholeModel
from autolora.adapters.wrapped import Wrapped, load_wrapped, merge_wrapped, save_wrapped
from autolora.compose import check_command_line, compose
from autolora.errors import BackboneError, ConfigError, TargetError
from autolora.export import main as export_main
from autolora.plan import Budget
from autolora.results import RunResult
from autolora.run import run_one
from autolora.strategies import make_strategy
from autolora.strategies.base import GroupRates, Rates
from autolora.strategies.outside import Outside
from autolora.validate import strategy_options

NAMES = ["head", "bitfit", "full", "prompt", "prefix", "ia3"]
PEFTS = NAMES[3:]
OPTIONS: dict[str, dict[str, Any]] = {"prompt": {"tokens": 5}, "prefix": {"tokens": 5, "projection": None}}
FAMILIES = ["bert", "roberta", "distilbert", "deberta_v2", "electra", "gpt2", "llama"]
RATES = Rates(adapter=GroupRates(1e-2), gate=GroupRates(None), head=GroupRates(1e-2))


def strategy_of(name: str, **options: Any) -> Outside[Any]:
    made = make_strategy(
        name, strategy_options(name)(**OPTIONS.get(name, {}) | options), budget=Budget(rank=4), max_rank=16
    )
    assert isinstance(made, Outside)
    return made


def put(name: str, model: nn.Module, seed: int = 0, **options: Any) -> Outside[Any]:
    strategy = strategy_of(name, **options)
    strategy.attach(model, AdapterSettings(seed=seed))
    return strategy


def trained(strategy: Outside[Any], batch: dict[str, Tensor], steps: int = 3) -> None:
    """A few steps on arbitrary labels."""
    model = strategy.adapters.model.train()
    optimizer = AdamW(strategy.param_groups(RATES, steps))
    strategy.begin(steps, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(output(model, batch), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    model.eval()


# What is trained ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["head", "bitfit", "full", "ia3"])
def test_identity_at_the_start(name: str, family: str) -> None:
    model, batch = make(family), inputs_for(family)
    expected = output(model, batch)
    if (name, family) == ("bitfit", "llama"):
        with pytest.raises(TargetError, match="LlamaForSequenceClassification has no biases outside its head"):
            put(name, model)
        return
    assert torch.equal(output(put(name, model).adapters.model, batch), expected)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_are_not_the_identity(name: str) -> None:
    model, batch = make("bert"), inputs_for("bert")
    expected = output(model, batch)
    assert (output(put(name, model).adapters.model.eval(), batch) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_counts_by_hand(name: str) -> None:
    """A BERT of width 16 with 2 layers, an MLP of 24, and 3 labels."""
    model = make("bert")
    size = sum(p.numel() for p in model.parameters())
    adapters, head = put(name, model).adapters, 16 * 3 + 3
    biases = 2 * (4 * 16 + 24 + 16 + 2 * 16) + 16 + 16  # Linears and LayerNorms; LayerNorm of the embeddings, pooler
    own = {"bitfit": biases, "full": size - head}.get(name, 0)
    # Five tokens: of width 16; keys and values in two layers; factors on keys, values and the inner MLP
    added = {"prompt": 5 * 16, "prefix": 5 * 2 * 2 * 16, "ia3": 2 * (16 + 16 + 24)}.get(name, 0)
    assert adapters.count() == {
        "adapter": 0, "added": added, "own": own, "gate": 0, "head": head, "trainable": head + own + added,
        "total": size + added,
    }  # fmt: skip
    assert adapters.active_plan() == dict.fromkeys(adapters.sites, 0)
    assert len(adapters.sites) == 13


def test_there_is_no_budget_and_every_rank_is_0() -> None:
    strategy = put("bitfit", make("bert"))
    assert strategy.allowance is None
    assert strategy.settled
    assert set(strategy.finalize(lambda plan: 0.0).values()) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_only_what_the_method_names_changes_and_detach_gives_the_model_back(name: str) -> None:
    model, batch = make("bert"), inputs_for("bert")
    expected, before = output(model, batch), snapshot(model)
    strategy = put(name, model)
    adapters, start = strategy.adapters, snapshot(strategy.adapters.model)
    trained(strategy, batch)
    changed = {key for key, tensor in snapshot(adapters.model).items() if not torch.equal(tensor, start[key])}
    head = {f"{module}.{own}" for module in adapters.fully_trained for own in ("weight", "bias")}
    unused = "bert.embeddings.token_type_embeddings.weight"  # but for its first row
    by_method: dict[str, set[str]] = {
        "head": set(),
        "bitfit": {key for key in before if key.endswith(".bias") and not key.startswith("classifier")},
        "full": {key for key, _ in model.named_parameters()},
        "prompt": {"prompt_encoder.default.embedding.weight"},
        "prefix": {"prompt_encoder.default.embedding.weight"},
        "ia3": {key for key in start if key.endswith("ia3_l.default")},
    }
    assert unused in before
    assert head <= changed
    still = {key for key in by_method[name] if key.endswith("key.bias")}  # attention does not depend on these
    assert by_method[name] - still <= changed <= head | by_method[name]
    if isinstance(adapters, Wrapped):
        with adapters.unwrapped() as base:
            inside = snapshot(base)
        assert inside.keys() == before.keys()
        assert all(torch.equal(inside[key], tensor) for key, tensor in before.items())
    assert (output(adapters.model, batch) - expected).abs().max() > 1e-3
    again = adapters.detach()
    assert again is model
    assert torch.equal(output(model, batch), expected)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_trainable_state_holds_what_training_changes(name: str) -> None:
    model, batch = make("bert"), inputs_for("bert")
    strategy = put(name, model)
    trained(strategy, batch)
    state, expected = strategy.adapters.trainable_state(), output(strategy.adapters.model, batch)
    other = put(name, make("bert"), seed=5)
    other.adapters.load_trainable_state(state)
    assert torch.equal(output(other.adapters.model.eval(), batch), expected)
    assert sum(tensor.numel() for tensor in state.values()) == strategy.adapters.count()["trainable"]


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_the_rates_of_adapters_and_head(name: str) -> None:
    rates = Rates(adapter=GroupRates(0.5), gate=GroupRates(None), head=GroupRates(0.25, 0.1))
    strategy = put(name, make("bert"))
    counts = strategy.adapters.count()
    groups = {
        group["name"]: (group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"]))
        for group in strategy.param_groups(rates, 10)
    }
    besides = counts["own"] + counts["added"]
    expected = {"adapter": (0.5, 0.0, besides), "head": (0.25, 0.1, counts["head"])}
    assert groups == {key: value for key, value in expected.items() if value[2]}


def test_full_leaves_alone_what_was_fixed_before() -> None:
    model = make("bert")
    positions = model.get_parameter("bert.embeddings.position_embeddings.weight").requires_grad_(False)
    adapters = put("full", model).adapters
    assert isinstance(adapters, WholeModel)
    assert not positions.requires_grad
    assert adapters.count()["own"] == adapters.count()["total"] - adapters.count()["head"] - positions.numel()


@pytest.mark.parametrize("name", PEFTS)
def test_random_numbers_are_drawn_from_a_stream_of_their_own(name: str) -> None:
    before = torch.get_rng_state()
    states = [put(name, make("bert"), seed=seed).adapters.trainable_state() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    same = [all(torch.equal(states[0][key], other[key]) for key in states[0]) for other in states[1:]]
    assert same == [True, name == "ia3"]


# (IA)3 ----------------------------------------------------------------------------------------------------------------


def test_ia3_scales_keys_values_and_the_inner_mlp_and_nothing_else() -> None:
    """Against the same model with the factors multiplied into its weights by hand."""
    model, plain, batch = make("bert"), make("bert"), inputs_for("bert")
    adapters = put("ia3", model).adapters
    with torch.no_grad():
        for name, factor in adapters.model.named_parameters():
            if not name.endswith("ia3_l.default"):
                continue
            factor.uniform_(0.5, 1.5)
            owner = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"))
            if name.endswith("output.dense.ia3_l.default"):
                owner.weight *= factor.flatten()[None, :]
            else:
                owner.weight *= factor.flatten()[:, None]
                owner.bias *= factor.flatten()
    torch.testing.assert_close(output(adapters.model, batch), output(plain, batch))


def test_targets_narrow_ia3_down() -> None:
    strategy = strategy_of("ia3")
    from autolora.adapters import Targets

    adapters = strategy.attach(make("bert"), AdapterSettings(targets=Targets(["value"])))
    assert adapters.count()["added"] == 2 * 16
    with pytest.raises(TargetError, match="expected modules for keys, values or the second map of an MLP"):
        strategy_of("ia3").attach(make("bert"), AdapterSettings(targets=Targets(["query"])))


# Virtual tokens -------------------------------------------------------------------------------------------------------


def longest(rows: int) -> Any:
    return SimpleNamespace(dataset=SimpleNamespace(max_length=rows))


@pytest.mark.parametrize(
    ("name", "family", "refused"),
    [
        ("prompt", "bert", None),
        ("prompt", "roberta", None),
        ("prompt", "distilbert", None),
        ("prompt", "deberta_v2", None),
        ("prompt", "electra", None),
        ("prompt", "gpt2", "GPT2ForSequenceClassification .* reads the padding of its batch"),
        ("prefix", "bert", None),
        ("prefix", "roberta", None),
        ("prefix", "electra", None),
        ("prefix", "gpt2", None),
        ("prefix", "llama", None),
        ("prefix", "distilbert", "DistilBertForSequenceClassification takes no keys and values from outside"),
        ("prefix", "deberta_v2", "takes no keys and values from outside .*: use strategy=prompt"),
    ],
)
def test_which_models_take_virtual_tokens(name: str, family: str, refused: str | None) -> None:
    model = make(family)

    def prepared() -> Outside[Any]:
        strategy = put(name, model)
        strategy.prepare(longest(20), lambda model, batch: torch.tensor(0.0))
        return strategy

    if refused is not None:
        with pytest.raises(TargetError, match=refused):
            prepared()
        return
    strategy, batch = prepared(), inputs_for(family)
    trained(strategy, batch)
    state = {name: p for name, p in strategy.adapters.model.named_parameters() if "prompt_encoder" in name}
    assert len(state) == 1
    assert all((p.grad.abs().sum(0) > 0).float().mean() > 0.9 for p in state.values() if p.grad is not None)
    alone = {key: value[:1, :4] for key, value in batch.items()}
    padded = {"input_ids": batch["input_ids"][:1].clone(), "attention_mask": batch["attention_mask"][:1].clone()}
    padded["input_ids"][:, 4:], padded["attention_mask"][:, 4:] = int(model.config.pad_token_id), 0  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(output(strategy.adapters.model, padded), output(strategy.adapters.model, alone))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_row_and_the_virtual_tokens_have_to_fit(name: str) -> None:
    fits, strategy = put(name, make("bert")), put(name, make("bert"))
    fits.adapters.model.train()
    fits.prepare(longest(27), lambda model, batch: torch.tensor(0.0))  # of 32 positions
    assert all(module.training for module in fits.adapters.model.modules())
    with pytest.raises(
        TargetError, match=r"cannot read a row of data\.max_length=28 tokens .*: lower data\.max_length"
    ):
        strategy.prepare(longest(28), lambda model, batch: torch.tensor(0.0))


def test_prompts_start_as_words_or_as_noise() -> None:
    words = make("bert").get_parameter("bert.embeddings.word_embeddings.weight")
    key = "prompt_encoder.default.embedding.weight"
    prompts = put("prompt", make("bert")).adapters.model.get_parameter(key)
    assert all(any(torch.equal(row, word) for word in words) for row in prompts)
    noise = put("prompt", make("bert"), init="random", tokens=500).adapters.model.get_parameter(key)
    assert float(noise.detach().std()) == pytest.approx(1, abs=0.05)


def test_prefixes_may_come_out_of_a_network() -> None:
    """Five embeddings of width 16, through a hidden layer of 7, into keys and values of two layers."""
    counts = put("prefix", make("bert"), projection=7).adapters.count()
    assert counts["trainable"] - counts["head"] == 5 * 16 + (16 * 7 + 7) + (7 * 64 + 64)
    assert counts["added"] == 5 * 2 * 2 * 16  # the network is thrown away


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [("ia3", family) for family in FAMILIES]
    + [("prompt", family) for family in ("roberta", "distilbert", "electra")]
    + [("prefix", family) for family in ("roberta", "electra", "gpt2", "llama")],
)
def test_stock_peft_loads_what_is_written(name: str, family: str, tmp_path: Path) -> None:
    """Onto a model whose head, and what the pretrained weights lack, start at other values."""
    from peft import PeftModel

    fresh = {"distilbert": "pre_classifier", "deberta_v2": "pooler.dense"}.get(family)
    names = (f"{fresh}.weight", f"{fresh}.bias") if fresh else ()
    strategy, batch = put(name, make(family)), inputs_for(family)
    trained(strategy, batch)
    assert isinstance(strategy.adapters, Wrapped)
    save_wrapped(strategy.adapters, tmp_path / "adapter", base_model="somewhere", fresh=names)
    expected = output(strategy.adapters.model, batch)

    def backbone() -> nn.Module:
        model, other = make(family), make(family, seed=7)
        for module in filter(None, (fresh, strategy.adapters.heads[0])):
            model.get_submodule(module).load_state_dict(other.get_submodule(module).state_dict())
        return model

    in_peft = PeftModel.from_pretrained(backbone(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(output(in_peft, batch), expected, rtol=0, atol=1e-6)
    loaded = load_wrapped(backbone(), tmp_path / "adapter").eval()
    torch.testing.assert_close(output(loaded, batch), expected, rtol=0, atol=1e-6)
    if name == "ia3":
        torch.testing.assert_close(output(merge_wrapped(loaded), batch), expected, rtol=0, atol=1e-5)
    with pytest.raises(BackboneError, match="trained on another backbone"):
        load_wrapped(make(family, seed=7), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "autolora.json",
    }  # fmt: skip


# Whole runs -----------------------------------------------------------------------------------------------------------

RUN = {"prefix": ("strategy.projection=6",)}


def run_of(configure: Any, name: str, *overrides: str) -> tuple[Any, RunResult]:  # noqa: F811
    cfg = configure(f"strategy={name}", *RUN.get(name, ()), *overrides)
    return cfg, run_one(cfg)


@pytest.fixture
def configured(configure: Any) -> Any:  # noqa: F811
    """Without the budget and the rate that other tests want."""

    def make(*overrides: str, **rest: Any) -> Any:
        return configure(*overrides, "budget.rank=null", "max_rank=16", **rest)

    return make


def saved_logits(path: Path) -> Tensor:
    rows = list(csv.DictReader(path.open()))
    return torch.tensor([[float(row["logit_0"]), float(row["logit_1"])] for row in rows])


def dev_logits(model: nn.Module, tokenizer: Any, folder: Path) -> Tensor:
    sentences = [line.split("\t")[0] for line in (folder / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits: Tensor = model.eval()(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    return logits


def in_onnxruntime(file: Path) -> nn.Module:
    """A graph with the calling convention of a model."""
    from onnxruntime import InferenceSession

    class Graph(nn.Module):
        def forward(self, **tokens: Tensor) -> Any:
            inputs = {name: tensor.numpy() for name, tensor in tokens.items()}
            return SimpleNamespace(logits=torch.from_numpy(session.run(["logits"], inputs)[0]))

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return Graph()


def export(run: Path, out: Path, kind: str) -> int:
    try:
        export_main([f"run={run}", f"out={out}", f"format={kind}"])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_its_files_and_its_exports(
    name: str,
    configured: Any,
    tiny_bert_dir: Path,
    sst2: Path,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Stock PEFT and transformers compute the predictions of the run from what it wrote, and from what is exported."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from autolora.backbones import load_backbone

    rate = 1e-3 if name == "full" else 3e-2
    cfg, result = run_of(configured, name, f"optim.adapter.lr={rate}")
    files = directory_of(cfg, result)
    head, params = 32 * 2 + 2, result.params
    extra = {
        "bitfit": 2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32,
        "full": params.backbone,
        "prompt": 20 * 32,
        "prefix": 20 * 2 * 2 * 32,
        "ia3": 2 * (32 + 32 + 64),
    }
    assert (params.adapter, params.extra, params.head, params.budget) == (0, extra.get(name, 0), head, None)
    network = 20 * 32 + (32 * 6 + 6) + (6 * 128 + 128)  # that the prefixes come out of
    assert params.peak_trainable == (network if name == "prefix" else extra.get(name, 0)) + head
    if name in ("prompt", "prefix", "ia3"):
        tensors = load_file(files.adapter / "adapter_model.safetensors")
        assert result.adapter_bytes == sum(tensor.nbytes for key, tensor in tensors.items() if "classifier" not in key)
    assert (
        params.backbone
        == sum(p.numel() for p in load_backbone(path=tiny_bert_dir, num_labels=2).model.parameters()) - head
    )
    assert result.ranks == dict.fromkeys(result.ranks, 0)
    assert len(result.ranks) == 13
    assert "peft" in result.versions

    written = {file.name for file in files.adapter.iterdir()}
    whole = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert written == {"autolora.json"} | (
        whole if name == "full" else {"adapter_config.json", "adapter_model.safetensors"}
    )
    expected = saved_logits(files.predictions)
    backbone = load_backbone(path=tiny_bert_dir, num_labels=2, head_seed=123)
    untrained = dev_logits(backbone.model, backbone.tokenizer, sst2)
    assert (untrained - expected).abs().max() > 1e-2

    capfd.readouterr()
    codes = [export(files.path, tmp_path / kind, kind) for kind in ("peft", "merged")]
    errors = capfd.readouterr().err
    assert codes == [int(name == "full"), int(name in ("prompt", "prefix"))]
    if name not in ("head", "bitfit"):  # plain models like those of full and ia3, and an export takes seconds
        assert export(files.path, tmp_path / "onnx", "onnx") == codes[1]
        assert capfd.readouterr().err == errors.replace("merged", "onnx") * codes[1]
    if name == "full":
        assert errors == (
            "error: format=peft: strategy=full has trained the whole model, so there is no adapter: use format=merged\n"
        )
    else:
        in_peft = PeftModel.from_pretrained(backbone.model, str(tmp_path / "peft"))
        torch.testing.assert_close(dev_logits(in_peft, backbone.tokenizer, sst2), expected, rtol=1e-4, atol=1e-5)
    if name in ("prompt", "prefix"):
        assert errors == (
            f"error: format=merged: strategy={name} trains virtual tokens, which no weight can take in: use "
            "format=peft\n"
        )
        assert not (tmp_path / "merged").exists()
    else:
        merged, report = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
        assert not any(report.values())
        assert {file.name for file in (tmp_path / "merged").iterdir()} == whole
        assert merged.config.id2label == {0: "negative", 1: "positive"}
        torch.testing.assert_close(dev_logits(merged, backbone.tokenizer, sst2), expected, rtol=1e-4, atol=1e-5)
        if name in ("full", "ia3"):
            graph = in_onnxruntime(tmp_path / "onnx" / "model.onnx")
            torch.testing.assert_close(dev_logits(graph, backbone.tokenizer, sst2), expected, rtol=1e-4, atol=1e-5)


RESUMED = {
    "head": ("trainer.accumulate_grad_batches=2", "trainer.max_epochs=4"),
    "bitfit": ("trainer.checkpoint=best", "trainer.val_check_interval=2"),
    "full": ("trainer.checkpoint=best", "trainer.val_check_interval=3"),
    "prompt": ("trainer.checkpoint=best", "strategy.init=random"),
    "prefix": ("strategy.projection=6",),
    "ia3": ("trainer.early_stopping_patience=3", "trainer.val_check_interval=3", "trainer.max_epochs=4"),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    name: str,
    configured: Any,
    stopper: Stopper,  # noqa: F811
    tmp_path: Path,
) -> None:
    extra = (f"strategy={name}", "trainer.log_every_n_steps=4", *RESUMED[name])
    unbroken, broken = configured(*extra), configured(*extra, f"run_root={tmp_path / 'broken'}")
    run_one(unbroken)
    assert interrupted_run(broken, stopper, 5) >= 2
    assert outcome(broken) == outcome(unbroken)


@pytest.mark.parametrize("name", ["prompt", "ia3"])
def test_weights_that_the_backbone_lacks_travel_along(
    name: str,
    configured: Any,
    tiny_bert_dir: Path,
    sst2: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A pooler that is not among the pretrained weights starts at random, elsewhere at other values than here."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

    poolerless = Path(shutil.copytree(tiny_bert_dir, tmp_path / "poolerless"))
    BertModel.from_pretrained(tiny_bert_dir, add_pooling_layer=False).save_pretrained(poolerless)
    cfg, result = run_of(configured, name, f"backbone.path={poolerless}", "trainer.max_steps=3")
    files = directory_of(cfg, result)
    base = AutoModelForSequenceClassification.from_pretrained(poolerless, num_labels=2)
    in_peft = PeftModel.from_pretrained(base, str(files.adapter))
    logits = dev_logits(in_peft, AutoTokenizer.from_pretrained(poolerless), sst2)
    torch.testing.assert_close(logits, saved_logits(files.predictions), rtol=1e-4, atol=1e-5)
    assert export(files.path, tmp_path / "out", "peft") == 0


def spoiled(run: Path, what: str) -> None:
    sidecar = run / "adapter" / "autolora.json"
    content = json.loads(sidecar.read_text())
    if what == "other backbone":
        content["fingerprint"]["hashes"]["bfloat16"] = "0" * 32
        sidecar.write_text(json.dumps(content))
    else:
        (weights,) = (run / "adapter").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("ia3", "other backbone", "this adapter was trained on another backbone"),
        ("ia3", "cut short", "damaged or cut short"),
        ("full", "other backbone", "the weights are not those of the run"),
        ("full", "cut short", "the model cannot be loaded"),
    ],
)
def test_what_is_damaged_is_not_exported(
    name: str, what: str, message: str, configured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, result = run_of(configured, name, "trainer.max_steps=1")
    run = directory_of(cfg, result).path
    spoiled(run, what)
    assert export(run, tmp_path / "out", "merged") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_rows_that_leave_no_room_are_refused_before_training(name: str, configured: Any) -> None:
    """The tiny BERT has 512 positions, and its tokenizer allows as many."""
    cfg = configured(f"strategy={name}", "data.max_length=493", "trainer.max_steps=1")
    with pytest.raises(
        TargetError, match=r"BertForSequenceClassification .* cannot read a row of data\.max_length=493"
    ):
        run_one(cfg)
    assert not list(cfg.run_root.glob("*/history.csv"))


@pytest.mark.parametrize("name", PEFTS)
def test_bfloat16(name: str, configured: Any) -> None:
    _, result = run_of(configured, name, "trainer.precision=bf16-mixed", "trainer.max_steps=2")
    assert result.hardware["precision"] == "bf16-mixed"
    assert result.status == "complete"


# Planted ranks --------------------------------------------------------------------------------------------------------

PLANTED = (
    "task=planted", "task.dim=12", "task.widths=[8]", "task.ranks=[2,1]", "task.eval_size=64", "data.batch_size=16",
    "logger=csv", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
)  # fmt: skip


def test_full_fits_a_planted_teacher_and_keeps_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose([*PLANTED, "strategy=full", "trainer.max_steps=300", "optim.adapter.lr=1e-2", f"run_root={tmp_path}"])
    result = run_one(cfg)
    assert result.metrics.value is not None
    assert result.metrics.value < 1e-2
    assert (result.params.extra, result.params.head) == (2 * 8 * 12, 0)
    assert result.planted is not None
    assert (result.planted.found, result.planted.exact_fraction) == (None, None)
    run = directory_of(cfg, result)
    state = load_file(run.adapter / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {"U0.weight": (8, 12), "V0.weight": (12, 8)}
    for kind in ("peft", "merged"):
        assert export(run.path, tmp_path / kind, kind) == 1
        assert "task=planted, strategy=full: no library loads this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head", "strategy=head: .* has no classification head, so there is nothing to train"),
        ("bitfit", "strategy=bitfit: .* has no biases outside its head, so there is nothing to train"),
    ],
)
def test_nothing_to_train_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message):
        run_one(compose([*PLANTED, f"strategy={name}", "trainer.max_steps=1", f"run_root={tmp_path}"]))


# The configuration ----------------------------------------------------------------------------------------------------


def faults_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_command_line(argv)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_budget_by_default_and_the_rates_suit(name: str) -> None:
    config = compose([f"strategy={name}"])
    assert not config.budget.enabled
    rates = {"head": 1e-3, "bitfit": 1e-3, "full": 5e-5, "prompt": 1e-2, "prefix": 1e-3, "ia3": 1e-2}
    assert config.optim.adapter.lr == rates[name]
    assert compose([f"strategy={name}", "optim.adapter.lr=0.5"]).optim.adapter.lr == 0.5
    assert config.optim.head.lr == 1e-3


NOTHING_TO_COUNT = (
    "strategy={} has no adapters that a budget could count: leave it out, and give strategy={} a command of its own in "
    "a comparison of methods with one (the same run_root)"
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("budget.rank=2", f"budget.rank=2: {NOTHING_TO_COUNT}"),
        ("budget.params=9", f"budget.params=9: {NOTHING_TO_COUNT}"),
        ("retrain=found", "retrain=found: strategy={} chooses no ranks to train again at: leave it out"),
        ("adapter.bias=all", "adapter.bias=all: strategy={} says by itself what is trained: leave it out"),
    ],
)
def test_what_needs_ranks_is_a_fault(name: str, override: str, fault: str) -> None:
    assert faults_of(f"strategy={name}", override) == [fault.replace("{}", name)]


@pytest.mark.parametrize("name", PEFTS)
def test_a_model_that_peft_does_not_know_is_a_fault(name: str) -> None:
    (fault,) = faults_of(f"strategy={name}", "task=planted")
    assert fault == f"strategy={name}: expected a text classifier, and task=planted has none: use a GLUE task"


@pytest.mark.parametrize("name", PEFTS)
def test_the_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    (fault,) = faults_of(f"strategy={name}", "logger=csv")
    assert fault == f"strategy={name}: PEFT is not installed: pip install 'autolora[peft]'"
    compose(["strategy=head", "logger=csv"])


def test_the_missing_extra_is_named_by_export_too(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, result = run_of(configured, "ia3", "trainer.max_steps=1")
    monkeypatch.setattr("autolora.export.importlib.util.find_spec", lambda package: None)
    assert export(directory_of(cfg, result).path, tmp_path / "out", "peft") == 1
    assert "strategy=ia3: PEFT is not installed: pip install 'autolora[peft]'" in capsys.readouterr().err
