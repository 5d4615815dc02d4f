"""Which modules the targets select, and what is said when they select nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from adapters.tiny_models import make
from torch import nn

from autolora.adapters import AdapterSettings, Targets, find_sites, largest_plan
from autolora.adapters.select import match_modules, match_ranks, matches, select
from autolora.compose import compose
from autolora.errors import PlanError, TargetError
from autolora.parts import adapter_settings
from autolora.paths import config_root


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.monkey = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Net(nn.Module):
    """Twelve blocks, so that layer 1 has to be told from 10 and 11; a projection before and a head after."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def chosen(model: nn.Module, fully_trained: Sequence[str] = ("classifier",), **spec: object) -> list[str]:
    return select(model, Targets(**spec), fully_trained)  # type: ignore[arg-type]


def of(leaf: str, layers: Sequence[int] = range(12)) -> list[str]:
    return [f"layers.{i}.{leaf}" for i in layers]


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("key", "key", True),
        ("key", "layers.0.key", True),
        ("key", "layers.0.monkey", False),
        ("key", "key.0", False),
        ("0.key", "layers.0.key", True),
        ("0.key", "layers.10.key", False),
        ("layers.0.key", "layers.0.key", True),
        (r".*\.(key|query)", "layers.0.query", True),
        (r".*key", "layers.0.monkey", True),
        (r"layers\.\d\.key", "layers.11.key", False),
        (r"key|query", "layers.0.key", False),  # a regular expression is over the full name
        ("block-1.key", "block-1.key", True),
        ("block-1.key", "net.block-1.key", True),
        ("layersX0.key", "layers.0.key", False),
    ],
)
def test_matches(pattern: str, name: str, hit: bool) -> None:
    assert matches(pattern, name) is hit


def test_all_linear_on_bert_is_everything_but_the_classifier() -> None:
    model = make("bert")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sites = find_sites(model, AdapterSettings())
    assert list(sites) == [name for name in linears if name != "classifier"]
    assert "bert.pooler.dense" in sites
    assert len(sites) == 2 * 6 + 1


def test_nothing_inside_a_fully_trained_module_is_adapted() -> None:
    assert chosen(Net()) == ["embed", *(f"layers.{i}.{leaf}" for i in range(12) for leaf in ("query", "key", "monkey"))]
    assert "classifier.2" in chosen(Net(), fully_trained=())


def test_names_suffixes_and_regular_expressions() -> None:
    assert chosen(Net(), targets="key") == of("key")
    assert chosen(Net(), targets=["key", "embed"]) == ["embed", *of("key")]
    assert chosen(Net(), targets="layers.3.query") == ["layers.3.query"]
    assert chosen(Net(), targets=r"layers\.[01]\.(query|key)") == [
        f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("query", "key")
    ]
    assert chosen(Net(), targets=[r".*\.1\.key", "2.key"]) == of("key", [1, 2])


def test_exclude() -> None:
    assert chosen(Net(), exclude=["embed", "monkey", r"layers\.\d\d\..*"]) == [
        f"layers.{i}.{leaf}" for i in range(10) for leaf in ("query", "key")
    ]


def test_layers() -> None:
    assert chosen(Net(), targets="key", layers_to_transform=[1]) == of("key", [1])
    assert chosen(Net(), targets="key", layers_to_transform=[11, 0], layers_pattern="layers") == of("key", [0, 11])
    assert chosen(Net(), layers_to_transform=[1]) == [f"layers.1.{leaf}" for leaf in ("query", "key", "monkey")]


def test_layers_pattern_says_which_numbers_count() -> None:
    model = make("t5_encoder")
    first = chosen(model, (), layers_to_transform=[1])
    assert {name.split(".")[2] for name in first} == {"1"}
    assert {name.split(".")[4] for name in first} == {"0", "1"}
    inner = chosen(model, (), layers_to_transform=[1], layers_pattern="layer")
    assert {name.split(".")[2] for name in inner} == {"0", "1"}
    assert {name.split(".")[4] for name in inner} == {"1"}


# Errors ---------------------------------------------------------------------------------------------------------------


def test_nothing_matched_lists_candidates() -> None:
    with pytest.raises(TargetError) as error:
        chosen(Net(), targets=["querry"])
    assert str(error.value) == (
        "targets: 'querry' matches no module. Candidates: embed, layers.*.query, layers.*.key, layers.*.monkey"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"targets": ["key", "val"]}, r"targets: 'val' matches no module"),
        ({"targets": "ke"}, r"targets: 'ke' matches no module"),
        ({"targets": "classifier.0"}, r"targets: 'classifier.0' matches no module"),
        ({"targets": "("}, r"'\(': expected a module name or a regular expression"),
        ({"exclude": ["nope"]}, r"exclude: 'nope' matches no module"),
        ({"targets": "key", "exclude": [".*"]}, r"nothing is left to adapt after exclude"),
        ({"targets": []}, r"nothing is left to adapt"),
        ({"layers_to_transform": [3, 12]}, r"no layer \[12\]; the layers are \[0, 1, .*, 11\]"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"layers_pattern=blocks matches no numbered layer"),
        ({"targets": "embed", "layers_to_transform": [0]}, r"no name has a layer number"),
        ({"layers_pattern": "layers"}, r"layers_pattern=layers: expected layers_to_transform"),
    ],
)
def test_patterns_that_match_nothing_are_errors(spec: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        chosen(Net(), **spec)


def test_a_model_without_a_linear_outside_the_head() -> None:
    with pytest.raises(TargetError, match=r"no linear-like module outside the fully trained ones"):
        chosen(nn.Sequential(nn.Embedding(3, 4)))
    with pytest.raises(TargetError, match=r"modules_to_save: 'clasifier' matches no module"):
        find_sites(Net(), AdapterSettings(modules_to_save=["clasifier"]))


# Shared and nested modules --------------------------------------------------------------------------------------------


def test_a_shared_linear_is_selected_once_by_either_name() -> None:
    model = Net()
    model.layers[3].monkey = model.layers[0].query
    assert chosen(model).count("layers.0.query") == 1
    assert "layers.3.monkey" not in chosen(model)
    assert chosen(model, targets="layers.3.monkey") == ["layers.0.query"]
    assert "layers.0.query" not in chosen(model, exclude=["layers.3.monkey"])


def test_a_linear_that_the_head_shares_is_trained_in_full_not_adapted() -> None:
    model = Net()
    model.classifier[0] = model.embed
    assert "embed" not in chosen(model)


def test_a_linear_inside_a_linear_like_module_is_not_adapted_twice() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.in_features, self.out_features = nn.Linear(4, 4), 4, 4

    model = Net()
    model.embed = Wrapper()
    assert chosen(model)[:2] == ["embed", "layers.0.query"]


# Modules and ranks by pattern -----------------------------------------------------------------------------------------


def test_match_modules_gives_outermost_modules() -> None:
    assert match_modules(Net(), ["classifier", r"classifier\..*"], "modules_to_save") == ["classifier"]
    assert match_modules(Net(), ["layers.1"], "modules_to_save") == ["layers.1"]


def test_rank_pattern_first_match_wins() -> None:
    names = ["layers.0.key", "layers.1.key", "layers.0.query"]
    assert match_ranks(names, {"1.key": 2, "key": 3}, 8) == dict(zip(names, (3, 2, 8), strict=True))
    with pytest.raises(TargetError, match=r"rank_pattern: 'value' matches no module"):
        match_ranks(names, {"value": 2}, 8)


def test_largest_plan_clips_with_a_warning() -> None:
    model = Net()
    settings = AdapterSettings(Targets(targets=["key", "embed"]), rank_pattern={"embed": 2, "0.key": 0})
    sites = find_sites(model, settings)
    with pytest.warns(UserWarning, match=r"rank of 11 of 13 modules is clipped .* layers\.1\.key from 16 to 4"):
        plan = largest_plan(sites, settings, 16)
    assert dict(plan) == {"embed": 2, "layers.0.key": 0} | dict.fromkeys(of("key", range(1, 12)), 4)
    with pytest.raises(PlanError, match=r"rank of embed: expected .*, got -1"):
        largest_plan(sites, AdapterSettings(rank_pattern={"embed": -1}), 2)


@pytest.mark.parametrize("name", sorted(file.stem for file in (config_root() / "experiment").glob("adalora_deberta_*")))
def test_published_settings_adapt_six_linears_of_every_layer_of_deberta(name: str) -> None:
    """And have the scale alpha / r of the ranks that they begin with."""
    cfg = compose([f"experiment={name}"])
    sites = find_sites(make("deberta_v2"), adapter_settings(cfg))
    layers = {int(module.split(".layer.")[1].split(".")[0]) for module in sites}
    assert len(sites) == 6 * len(layers) > 6
    assert cfg.adapter.effective_scale() == cfg.adapter.alpha / cfg.max_rank  # type: ignore[operator]
    assert 0.09 < cfg.strategy.options.t_init < 0.18  # type: ignore[attr-defined]
    assert 0.43 < cfg.strategy.options.t_final < 0.59  # type: ignore[attr-defined]
