"""What we write loads in stock PEFT, what PEFT writes loads in ours: same logits, nothing missing, nothing over."""

from __future__ import annotations

import copy
import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import tiny_models
from adapters.tiny_models import BASE, FAMILIES, TASKS, Shared, inputs_for, output, randomize, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from autolora.adapters import Adapters, AdapterSettings, SelectorGate, Targets, attach, compact, find_sites
from autolora.adapters.bare import merged
from autolora.adapters.fingerprint import fingerprint, own_parameters
from autolora.adapters.peft_format import load_peft, read_sidecar, save_peft
from autolora.adapters.peft_format.names import exactly, pattern_value
from autolora.errors import BackboneError, DataError, DiskFullError, TargetError
from autolora.plan import RankPlan

MAX_RANK = 3


def make(family: str) -> nn.Module:
    return tiny_models.enlarged(tiny_models.make(family))


def task_type(family: str) -> str | None:
    return TASKS.get(family, "SEQ_CLS")


def trained(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> Adapters:
    """Adapters with learned selectors and trained biases where asked for, after ten steps; ranks 0 to 3 are on."""
    chosen = AdapterSettings(**settings)
    sites = find_sites(model, chosen)
    plan = RankPlan(sites, {name: min(MAX_RANK, site.full_rank) for name, site in sites.items()})
    adapters = attach(model, chosen, plan, lambda name, rank: SelectorGate(rank, "sigmoid"))
    randomize(adapters)
    with torch.no_grad():
        for i, layer in enumerate(adapters.layers.values()):
            on = torch.arange(MAX_RANK) < i % (MAX_RANK + 1)
            layer.gate.logits.copy_(torch.tensor([2.0, 1.0, 0.5]) * torch.where(on, 1, -1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        output(model, batch).sin().mean().backward()
        optimizer.step()
    model.eval()
    return adapters


def in_peft(base: nn.Module, folder: Path) -> PeftModel:
    """Loaded by PEFT without a warning; every tensor of the file is used, and no adapter tensor is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        model = PeftModel.from_pretrained(base.eval(), str(folder))
        result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key] == []
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return output(model.eval(), batch)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compacted", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, compacted: bool, tmp_path: Path) -> None:
    base, batch = make(family), inputs_for(family)
    model = copy.deepcopy(base)
    before, bare = snapshot(model), logits(model, batch)
    adapters = trained(model, batch)
    plan = adapters.active_plan()
    assert set(plan.values()) == {0, 1, 2, 3}
    expected = logits(model, batch)
    assert (expected - bare).abs().max() > 1e-2
    if compacted:
        compact(adapters)
    save_peft(adapters, tmp_path / "adapter", base_model="tiny", task_type=task_type(family))
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "autolora.json",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    close(logits(in_peft(copy.deepcopy(base), tmp_path / "adapter"), batch), expected)

    again = copy.deepcopy(base)
    ours = load_peft(again, tmp_path / "adapter")
    close(logits(again, batch), expected)
    in_full = (read_sidecar(tmp_path / "adapter") or {})["in_full"]
    assert ours.active_plan() == {name: rank for name, rank in plan.items() if name not in in_full}
    for handle, adapted in ((adapters, model), (ours, again)):
        handle.detach()
        after = snapshot(adapted)
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(logits(adapted, batch), bare)


# What PEFT's format cannot say directly -------------------------------------------------------------------------------


def test_distilbert_writes_the_layer_that_peft_takes_for_a_head_in_full(tmp_path: Path) -> None:
    """``pre_classifier`` ends in ``classifier``: PEFT saves it in full whatever the configuration says."""
    base, batch = make("distilbert"), inputs_for("distilbert")
    model = copy.deepcopy(base)
    adapters = trained(model, batch)
    adapters.fix_gates({"pre_classifier": torch.ones(3)})
    merged_weight = base.pre_classifier.weight + adapters.layers["pre_classifier"].delta_weight()
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type="SEQ_CLS")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    torch.testing.assert_close(tensors["base_model.model.pre_classifier.weight"], merged_weight)
    assert [key for key in tensors if "pre_classifier.lora" in key] == []
    close(logits(in_peft(copy.deepcopy(base), tmp_path / "a"), batch), logits(model, batch))


def test_parameters_that_the_pretrained_weights_lack_travel_along(tmp_path: Path) -> None:
    """They start at random in every process, so that an update of them means nothing elsewhere."""
    base, batch = make("deberta_v2"), inputs_for("deberta_v2")
    model = copy.deepcopy(base)
    adapters = trained(model, batch)
    expected = logits(model, batch)
    fresh = ("pooler.dense.weight", "pooler.dense.bias")
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type="SEQ_CLS", fresh=fresh)
    with torch.no_grad():
        base.pooler.dense.weight.normal_()
        base.pooler.dense.bias.normal_()
    close(logits(in_peft(copy.deepcopy(base), tmp_path / "a"), batch), expected)
    load_peft(base, tmp_path / "a")
    close(logits(base, batch), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta_v2"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_and_learned_scales(family: str, bias: str, tmp_path: Path) -> None:
    base, batch = make(family), inputs_for(family)
    model = copy.deepcopy(base)
    before = snapshot(base)
    adapters = trained(model, batch, bias=bias, learn_scale=True, scale=1.3, dropout=0.2)
    compact(adapters)
    expected = logits(model, batch)
    moved = [n for n, p in own_parameters(model) if n.endswith("bias") and not torch.equal(p, before[n])]
    assert len([name for name in moved if not name.startswith(("classifier", "score"))]) > 3
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type="SEQ_CLS")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["bias"] in (bias, "all")  # a bias stays trained where the rank became 0
    assert config["lora_dropout"] == 0
    close(logits(in_peft(copy.deepcopy(base), tmp_path / "a"), batch), expected)
    ours = load_peft(base, tmp_path / "a")
    close(logits(base, batch), expected)
    ours.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(base).items())


@pytest.mark.parametrize("family", ["bert", "t5_encoder"])
def test_rank_0_everywhere(family: str, tmp_path: Path) -> None:
    """PEFT refuses to target nothing: one component of zeros stands in, and the sidecar says that its rank is 0."""
    base, batch = make(family), inputs_for(family)
    model = copy.deepcopy(base)
    adapters = trained(model, batch)
    adapters.fix_gates({})
    compact(adapters)
    expected = logits(model, batch)
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type=task_type(family))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    factors = [tensor for key, tensor in tensors.items() if "lora_" in key]
    assert len(factors) == 2
    assert sum(tensor.numel() for tensor in factors) == min(site.cost for site in adapters.sites.values())
    assert all((tensor == 0).all() for tensor in factors)
    assert torch.equal(logits(in_peft(copy.deepcopy(base), tmp_path / "a"), batch), expected)
    ours = load_peft(base, tmp_path / "a")
    assert set((read_sidecar(tmp_path / "a") or {})["ranks"].values()) == set(ours.active_plan().values()) == {0}
    assert torch.equal(logits(base, batch), expected)


class Tempting(nn.Module):
    """Names that end, begin or continue like one another, and characters that mean something in a pattern."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("key", "monkey", "layer-1", "score", "preclassifier"):
            self.add_module(name, nn.Linear(6, 6))
        self.layer = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])
        self.block = nn.ModuleDict({"key": nn.Linear(6, 6), "monkey": nn.Linear(6, 6), "layer": nn.Linear(6, 6)})
        self.layerx1 = nn.Linear(6, 6)
        self.underscore = nn.Linear(6, 6)

        self.order = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize("targets", ["all-linear", r"key|monkey|layer\.1|layer\.11|block\.layer|layer-1|underscore"])
@pytest.mark.parametrize("kind", [None, "SEQ_CLS"])
def test_names_that_tempt_get_their_own_rank(kind: str | None, targets: str, tmp_path: Path) -> None:
    base, x = Tempting(), torch.randn(5, 6)
    model = copy.deepcopy(base)
    settings = AdapterSettings(targets=Targets(targets))
    sites = find_sites(model, settings)
    adapters = attach(model, settings, RankPlan(sites, {name: 1 + i % 3 for i, name in enumerate(sites)}))
    randomize(adapters)
    expected = model(x).detach()
    save_peft(adapters, tmp_path / "a", base_model="tempting", task_type=kind)
    loaded = in_peft(copy.deepcopy(base), tmp_path / "a")
    in_full = (read_sidecar(tmp_path / "a") or {})["in_full"]
    # A head, what PEFT takes for it, and what it takes for the head that classifiers usually have.
    assert in_full == (["score", "preclassifier", "underscore"] if kind else ["score", "underscore"])
    found = {name: m.r["default"] for name, m in loaded.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert found == {name: rank for name, rank in adapters.active_plan().items() if name not in in_full}
    close(loaded.base_model(x), expected)
    load_peft(base, tmp_path / "a")
    close(base(x), expected)


def test_a_module_at_two_places_is_written_in_full(tmp_path: Path) -> None:
    """PEFT would adapt it at one of them."""
    base, x = Shared(), torch.randn(5, 4)
    model = copy.deepcopy(base)
    settings = AdapterSettings()
    adapters = attach(model, settings, RankPlan.uniform(find_sites(model, settings), 2))
    randomize(adapters)
    expected = model(x).detach()
    save_peft(adapters, tmp_path / "a", base_model="shared", task_type=None)
    assert (read_sidecar(tmp_path / "a") or {})["in_full"] == ["first", "again", "inner.0"]
    close(in_peft(copy.deepcopy(base), tmp_path / "a")(x), expected)
    load_peft(base, tmp_path / "a")
    close(base(x), expected)


# PEFT's own matching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns",
    [
        {"key": 2}, {exactly("key"): 2}, {exactly("a.key"): 3, "key": 2}, {"key": 2, exactly("a.key"): 3},
        {r"layer\.1": 4}, {exactly("layer.1"): 4}, {r".*\.key": 5}, {"a|b.key": 6}, {"layer.1": 7}, {"monkey": 8},
    ],
)  # fmt: skip
def test_pattern_semantics_are_those_of_peft(patterns: dict[str, int]) -> None:
    for name in ("key", "a.key", "b.a.key", "monkey", "a.monkey", "layer.1", "layer.11", "a.layer.1", "layerx1"):
        assert pattern_value(patterns, name, 1) == patterns.get(get_pattern_key(patterns, name), 1)


def test_a_caret_keeps_a_pattern_to_one_module() -> None:
    names = ["key", "a.key", "monkey", "layer.1", "layer.11", "a.layer.1", "layerx1", "layer-1"]
    for name in names:
        assert [other for other in names if get_pattern_key([exactly(name)], other) == exactly(name)] == [name]


# Stock adapters -------------------------------------------------------------------------------------------------------


def stock(family: str, folder: Path, **config: Any) -> tuple[nn.Module, Tensor]:
    """An adapter that PEFT made, trained and saved: the bare model, and the logits with the adapter."""
    base, batch = make(family), inputs_for(family)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return base, logits(model, batch)


STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha": ("bert", {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "rank_pattern": (
        "bert",
        {
            "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "rank_pattern": {"query": 2, r"layer\.1\..*": 3},
            "alpha_pattern": {"^bert.encoder.layer.0.attention.self.query": 5, "key": 1}, "task_type": "SEQ_CLS",
        },
    ),
    "rslora": ("roberta", {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["key"]}),
    "dropout": ("roberta", {"r": 3, "target_modules": ["value"], "lora_dropout": 0.1}),
    "rslora_patterns": (
        "roberta",
        {"r": 3, "use_rslora": True, "rank_pattern": {"key": 2}, "alpha_pattern": {"query": 9},
         "target_modules": ["key", "query"]},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"}),
    "regex": ("deberta_v2", {"r": 2, "target_modules": r".*\.(query|value)_proj", "modules_to_save": ["pooler"]}),
    "layers": ("bert", {"r": 2, "target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "bias_all": ("bert", {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias_lora": ("distilbert", {"r": 2, "target_modules": ["q_lin"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "no_task": ("vit", {"r": 2, "target_modules": ["attention.q_proj"], "modules_to_save": ["classifier"]}),
    "encoder": ("t5_encoder", {"r": 2, "target_modules": ["q", "v"], "modules_to_save": ["wo"]}),
    "whisper": ("whisper", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "fc1"]}),
    "audio": ("whisper_audio", {"r": 2, "target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "seq2seq": ("t5", {"r": 3, "target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "causal": ("llama_lm", {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "causal_conv1d": ("gpt2_lm", {"target_modules": "all-linear", "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "gaussian": ("llama", {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STOCK)
def test_stock_adapters_load_with_equal_logits(case: str, tmp_path: Path) -> None:
    family, config = STOCK[case]
    base, expected = stock(family, tmp_path, **config)
    before, batch = snapshot(base), inputs_for(family)
    assert (logits(base, batch) - expected).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = load_peft(base, tmp_path)
    close(logits(base, batch), expected)
    assert {layer.scale for layer in adapters.layers.values()} == {AdapterSettings().scale}
    compact(adapters)
    save_peft(adapters, tmp_path / "ours", base_model="tiny", task_type=config.get("task_type"))
    close(logits(in_peft(make(family), tmp_path / "ours"), batch), expected)
    adapters.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(base).items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("initialised", ["trained", "as PEFT begins"])
def test_ranks_above_those_that_a_product_can_have(initialised: str, tmp_path: Path) -> None:
    """PEFT takes any r: 40 on layers of width 32, and 4 on a classifier of two labels."""
    base = BertForSequenceClassification(BertConfig(**BASE | {"hidden_size": 32, "num_labels": 2})).eval()
    targets = ["query", "intermediate.dense", "classifier"]
    config = LoraConfig(r=40, lora_alpha=20, use_rslora=True, target_modules=targets, rank_pattern={"classifier": 4})
    theirs, batch = get_peft_model(copy.deepcopy(base), config), inputs_for("bert")
    if initialised == "trained":
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "stock"))
    before, expected = logits(base, batch), logits(theirs, batch)
    assert ((expected - before).abs().max() > 1e-2) == (initialised == "trained")
    adapters = load_peft(base, str(tmp_path / "stock"))
    close(logits(base, batch), expected)
    ranks = {name.rpartition(".")[2]: rank for name, rank in adapters.attached_plan().items()}
    assert ranks == {"query": 32, "dense": 24, "classifier": 2}
    assert all((layer.lora_A.norm(dim=1) > 1e-3).all() for layer in adapters.layers.values())  # can still be learned
    save_peft(adapters, tmp_path / "ours", base_model="tiny", task_type=None)
    adapters.detach()
    close(logits(in_peft(base, tmp_path / "ours"), batch), expected)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    stock("bert", folder, r=2, target_modules=["query"], task_type="SEQ_CLS")
    return folder


def altered(folder: Path, target: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of an adapter with other values in the configuration, and tensors replaced, added or (None) removed."""
    target.mkdir(exist_ok=True)
    values = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(values))
    held = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({key: tensor for key, tensor in held.items() if tensor is not None}, target / "adapter_model.safetensors")
    return target


NOWHERE = "base_model.model.bert.nowhere"
HEAD = "base_model.model.classifier"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "dora": ({"use_dora": True}, {}, "use_dora=True, which is not supported"),
    "lora_bias": ({"lora_bias": True}, {}, "lora_bias=True"),
    "parameters": ({"target_parameters": ["x.weight"]}, {}, "target_parameters"),
    "something new": ({"use_turbo": {"level": 11}}, {}, "use_turbo"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights=pissa_niter_4"),
    "adalora": ({"peft_type": "ADALORA"}, {}, "expected an adapter of peft_type LORA, got ADALORA"),
    "no type": ({"peft_type": None}, {}, "peft_type LORA, got None"),
    "bad pattern": ({"alpha_pattern": {"(": 3}}, {}, "not a regular expression"),
    "magnitude": ({}, {f"{QUERY}.lora_magnitude_vector": torch.ones(16)}, "DoRA is not supported"),
    "bias of B": ({}, {f"{QUERY}.lora_B.bias": torch.ones(16)}, "lora_bias is not supported"),
    "embedding": ({}, {"base_model.model.e.lora_embedding_A": torch.ones(2, 4)}, "an adapter on an embedding"),
    "convolution": ({}, {f"{QUERY}.lora_A.weight": torch.ones(2, 16, 1, 1)}, "expected a matrix"),
    "half a pair": ({}, {f"{QUERY}.lora_B.weight": None}, "one of lora_A and lora_B is missing"),
    "no such module": (
        {},
        {f"{NOWHERE}.lora_A.weight": torch.ones(2, 16), f"{NOWHERE}.lora_B.weight": torch.ones(16, 2)},
        "bert.nowhere: the model has no linear module of this name",
    ),
    "other shape": ({}, {f"{QUERY}.lora_A.weight": torch.ones(2, 15)}, "expected factors for in, out = 16, 16, got A"),
    "other ranks": ({}, {f"{QUERY}.lora_A.weight": torch.ones(3, 16)}, "expected factors for"),
    "other head": ({}, {f"{HEAD}.weight": torch.ones(5, 16)}, r"expected shape \(3, 16\), got \(5, 16\)"),
    "half a head": ({}, {f"{HEAD}.bias": None}, "classifier.bias: the module is saved in full, but"),
    "no head": ({}, {f"{HEAD}.weight": None, f"{HEAD}.bias": None}, "classifier.weight: the module is saved in full"),
    "unknown parameter": ({}, {"base_model.model.extra.weight": torch.ones(5)}, "extra.weight: the model has no such"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_reproduce_is_refused_and_the_model_untouched(
    case: str, stock_folder: Path, tmp_path: Path
) -> None:
    config, tensors, message = REFUSED[case]
    model = make("bert")
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        load_peft(model, altered(stock_folder, tmp_path, config, **tensors))
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tied_module_that_peft_would_untie_is_refused(tmp_path: Path) -> None:
    stock("t5_encoder", tmp_path, r=2, target_modules=["q"], modules_to_save=["shared"])
    with pytest.raises(TargetError, match="tied to a module that is saved in full"):
        load_peft(make("t5_encoder"), tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_file_is_a_clear_error(share: float, stock_folder: Path, tmp_path: Path) -> None:
    folder = altered(stock_folder, tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match="damaged or cut short"):
        load_peft(make("bert"), folder)


def test_pickled_weights_are_not_read(stock_folder: Path, tmp_path: Path) -> None:
    folder = altered(stock_folder, tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(DataError, match=r"\.bin file can carry code"):
        load_peft(make("bert"), folder)


def test_a_folder_that_is_none_and_that_of_a_run_are_told_apart(stock_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: expected the folder of a PEFT adapter, there is none"):
        load_peft(make("bert"), tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    inside = altered(stock_folder, tmp_path / "run" / "adapter")
    with pytest.raises(DataError, match=f"got that of a run: its adapter is in {inside}"):
        load_peft(make("bert"), tmp_path / "run")


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_damaged_configuration_is_a_clear_error(text: str | None, stock_folder: Path, tmp_path: Path) -> None:
    folder = altered(stock_folder, tmp_path)
    file = folder / "adapter_config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(DataError, match=r"adapter_config\.json"):
        load_peft(make("bert"), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "x"), ("lora_alpha", None), ("alpha_pattern", ["x"]), ("alpha_pattern", {"query": "4"}),
        ("lora_dropout", "a"), ("lora_dropout", 2), ("modules_to_save", "classifier"), ("use_rslora", "no"),
    ],
)  # fmt: skip
def test_values_that_no_configuration_has_are_a_clear_error(
    key: str, value: Any, stock_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"adapter_config\.json has {key}="):
        load_peft(make("bert"), altered(stock_folder, tmp_path, {key: value}))


def test_a_model_with_adapters_is_refused(stock_folder: Path) -> None:
    model = make("bert")
    load_peft(model, stock_folder)
    with pytest.raises(TargetError, match="already carries adapters; detach them first"):
        load_peft(model, stock_folder)


def test_names_without_the_prefix_and_with_the_adapter_name(stock_folder: Path, tmp_path: Path) -> None:
    """As older versions of PEFT, and people who convert adapters, write them."""
    (tmp_path / "old").mkdir()
    tensors = load_file(stock_folder / "adapter_model.safetensors")
    old = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").replace("classifier.", "classifier.modules_to_save.default.")
        old[name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")] = tensor
    old["classifier.original_module.weight"] = torch.ones(3, 16)
    save_file(old, tmp_path / "old" / "adapter_model.safetensors")
    (tmp_path / "old" / "adapter_config.json").write_text((stock_folder / "adapter_config.json").read_text())
    one, two, batch = make("bert"), make("bert"), inputs_for("bert")
    load_peft(one, stock_folder)
    load_peft(two, tmp_path / "old")
    assert torch.equal(logits(one, batch), logits(two, batch))


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    model = make("bert")
    save_peft(trained(model, inputs_for("bert")), tmp_path / "ours", base_model="org/tiny", task_type="SEQ_CLS")
    return tmp_path / "ours"


def test_another_backbone_is_refused(ours: Path) -> None:
    other = make("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 5] += 0.5
    before = snapshot(other)
    expected = fingerprint(make("bert"), ["classifier"])["bfloat16"][:12]
    with pytest.raises(BackboneError, match=rf"another backbone \(org/tiny\).*{expected}.*load that backbone"):
        load_peft(other, ours)
    assert list(snapshot(other)) == list(before)


def test_another_head_is_not_another_backbone(ours: Path) -> None:
    other = make("bert")
    with torch.no_grad():
        other.classifier.weight.normal_()
    load_peft(other, ours)


def test_a_sidecar_of_another_schema_is_refused(ours: Path) -> None:
    sidecar = json.loads((ours / "autolora.json").read_text())
    for schema in (1, 99, None):
        (ours / "autolora.json").write_text(json.dumps(sidecar | {"schema": schema}))
        with pytest.raises(DataError, match=f"expected schema 2, got {schema}: another version of AutoLoRA"):
            load_peft(make("bert"), ours)


@pytest.mark.parametrize(
    ("key", "value", "lacking"),
    [
        ("fingerprint", None, "fingerprint.hashes, fingerprint.without"),
        ("fingerprint", {"hashes": {}, "without": "x"}, "fingerprint.without"),
        ("ranks", [], "ranks"),
        ("base_model", None, "base_model"),
    ],
)
def test_a_sidecar_that_lacks_something_is_a_clear_error(key: str, value: Any, lacking: str, ours: Path) -> None:
    sidecar = json.loads((ours / "autolora.json").read_text())
    (ours / "autolora.json").write_text(json.dumps(sidecar | {key: value}))
    with pytest.raises(DataError, match=rf"autolora\.json: damaged: {lacking} missing or malformed"):
        load_peft(make("bert"), ours)


def test_an_adapter_that_lacks_a_module_which_its_sidecar_names_is_refused(ours: Path) -> None:
    tensors = load_file(ours / "adapter_model.safetensors")
    module = next(key for key in tensors if "lora_A" in key).partition(".lora_A")[0]
    save_file({key: t for key, t in tensors.items() if not key.startswith(module)}, ours / "adapter_model.safetensors")
    with pytest.raises(
        DataError, match=rf"lacks factors of {module.removeprefix('base_model.model.')}; copy or export"
    ):
        load_peft(make("bert"), ours)


@pytest.mark.parametrize("modules_to_save", [[], ["bert.pooler"], ["classifier"]])
def test_a_fresh_head_belongs_to_the_adapter_whether_trained_or_not(modules_to_save: list[str], tmp_path: Path) -> None:
    base, batch = make("bert"), inputs_for("bert")
    model = copy.deepcopy(base)
    adapters = trained(model, batch, modules_to_save=modules_to_save)
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type="SEQ_CLS", fresh=["classifier"])
    assert "classifier" in (read_sidecar(tmp_path / "a") or {})["fingerprint"]["without"]
    with torch.no_grad():
        base.classifier.weight.normal_()
    close(logits(in_peft(copy.deepcopy(base), tmp_path / "a"), batch), logits(model, batch))
    load_peft(base, tmp_path / "a")
    close(logits(base, batch), logits(model, batch))


# Writing --------------------------------------------------------------------------------------------------------------


def test_the_sidecar_says_what_peft_would_drop(tmp_path: Path) -> None:
    model = make("bert")
    adapters = trained(model, inputs_for("bert"), scale=0.7)
    plan = adapters.active_plan()
    save_peft(adapters, tmp_path / "a", base_model="org/tiny", task_type=None, metadata={"strategy": "autolora"})
    sidecar = read_sidecar(tmp_path / "a") or {}
    assert sidecar["ranks"] == plan
    assert 0 in sidecar["ranks"].values()
    assert {name: tuple(site) for name, site in sidecar["sites"].items()} == {
        name: (site.in_features, site.out_features) for name, site in plan.sites.items()
    }
    assert (sidecar["scale"], sidecar["base_model"], sidecar["run"]) == (0.7, "org/tiny", {"strategy": "autolora"})
    again = load_peft(make("bert"), tmp_path / "a")
    assert again.sites == adapters.sites
    assert again.active_plan() == plan
    assert {layer.scale for layer in again.layers.values()} == {0.7}


def test_dead_components_are_not_written(tmp_path: Path) -> None:
    model = make("bert")
    adapters = trained(model, inputs_for("bert"))
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type=None)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(tensor.numel() for key, tensor in tensors.items() if "lora_" in key) == adapters.active_plan().params
    assert adapters.active_plan().params < adapters.attached_plan().params


def test_writing_leaves_model_and_adapters_as_they_were(tmp_path: Path) -> None:
    model, batch = make("distilbert"), inputs_for("distilbert")
    adapters = trained(model, batch)
    adapters.merge()
    names, before = list(model.state_dict()), snapshot(model)
    save_peft(adapters, tmp_path / "a", base_model="tiny", task_type="SEQ_CLS")
    assert list(model.state_dict()) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert all(layer.merged for layer in adapters.layers.values())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "autolora.json"])
def test_a_full_disk_leaves_what_was_there(file: str, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    adapters = load_peft(make("bert"), ours)

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == file:
            with self.open("w") as stream:
                stream.write("{")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    real = Path.write_bytes if file.endswith("safetensors") else Path.write_text
    monkeypatch.setattr(Path, real.__name__, full)
    with pytest.raises(DiskFullError):
        save_peft(adapters, ours, base_model="tiny", task_type=None)
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before
    assert [path.name for path in ours.parent.iterdir()] == ["ours"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_bears_no_trace(family: str) -> None:
    base, batch = make(family), inputs_for(family)
    model = copy.deepcopy(base)
    adapters = trained(model, batch)
    expected, wrapped = logits(model, batch), list(model.state_dict())
    with merged(adapters) as plain:
        assert list(plain.state_dict()) == list(base.state_dict())
        assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
        torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == wrapped
    assert torch.equal(logits(model, batch), expected)
    adapters.detach()
    assert all(torch.equal(tensor, snapshot(base)[name]) for name, tensor in snapshot(model).items())
