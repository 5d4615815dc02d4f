"""Many adapters on one backbone compute what each computes alone, and nothing is copied, moved or shared."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from adapters import tiny_models
from adapters.tiny_models import inputs_for, output, randomize, snapshot
from multitask.small_bank import LABELS, logits, make, ranks, trained, write
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from autolora.adapters import AdapterSettings, PrefixGate, Targets, compact, find_sites
from autolora.adapters.peft_format import load_peft, save_peft
from autolora.errors import AdapterError, BackboneError, DataError, TargetError
from autolora.multitask.bank import AdapterBank
from autolora.plan import RankPlan


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def bank(folders: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(make(), base_model="tiny", task_type="SEQ_CLS")
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def alone(folder: Path, name: str) -> nn.Module:
    model = make(LABELS[name])
    load_peft(model, folder)
    return model


def test_each_adapter_computes_what_it_computes_alone_to_the_bit(bank: AdapterBank, folders: dict[str, Path]) -> None:
    assert bank.names == list(LABELS)
    for name, folder in folders.items():
        with bank.use(name):
            found = logits(bank.model)
        assert found.shape == (4, LABELS[name])
        assert torch.equal(found, logits(alone(folder, name)))


def test_stock_peft_says_the_same(bank: AdapterBank, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        peft = PeftModel.from_pretrained(make(LABELS[name]), str(folder)).eval()
        with bank.use(name):
            torch.testing.assert_close(logits(bank.model), logits(peft))


def test_an_adapter_that_stock_peft_has_made(tmp_path: Path) -> None:
    peft = get_peft_model(
        make(3), LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"], task_type="SEQ_CLS")
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(str(tmp_path))
    bank = AdapterBank(make(2))
    bank.add("theirs", tmp_path)
    with bank.use("theirs"):
        torch.testing.assert_close(logits(bank.model), logits(peft.eval()))


def test_without_a_choice_the_model_is_what_it_was(bank: AdapterBank) -> None:
    expected = logits(make())
    assert torch.equal(logits(bank.model), expected)
    assert torch.equal(logits(bank.bare()), expected)
    with bank.use("rte"), bank.use(None):
        assert torch.equal(logits(bank.model), expected)
    with pytest.raises(RuntimeError, match="inside"), bank.use("rte"):
        raise RuntimeError("inside")
    assert torch.equal(logits(bank.model), expected)


def test_choosing_touches_no_tensor_and_no_module(bank: AdapterBank) -> None:
    def state() -> list[tuple[str, int, int]]:
        return [(name, p.data_ptr(), p._version) for name, p in bank.model.named_parameters(remove_duplicate=False)]

    before, modules = state(), {name: id(module) for name, module in bank.model.named_modules()}
    attributes = [list(map(id, vars(module).values())) for module in bank.model.modules()]
    with bank.use("rte"):
        assert state() == before
        assert [list(map(id, vars(module).values())) for module in bank.model.modules()] == attributes
        assert {name: id(module) for name, module in bank.model.named_modules()} == modules
    assert state() == before


# Mixed batches -------------------------------------------------------------------------------------------------------

ROWS: list[str | None] = ["mnli", "rte", None, "stsb", "rte", "cola", "mnli"]


def test_each_row_of_a_mixed_batch_has_its_own_adapter_and_head(bank: AdapterBank) -> None:
    with bank.use(ROWS):
        mixed = logits(bank.model, rows=len(ROWS))
    assert mixed.shape == (len(ROWS), 3)
    for i, name in enumerate(ROWS):
        with bank.use(name):
            row = logits(bank.model, rows=len(ROWS), only=[i])[0]
        torch.testing.assert_close(mixed[i, : len(row)], row, rtol=1e-5, atol=1e-5)
        assert (mixed[i, len(row) :] == -torch.inf).all()


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta_v2", "gpt2", "llama", "vit"])
def test_mixed_batches_of_other_families(family: str) -> None:
    model = make(family=family)
    settings = AdapterSettings(
        targets=Targets(exclude=["pos_key_proj", "pos_query_proj"] if family == "deberta_v2" else [])
    )
    bank = AdapterBank(model)
    for shift, name in enumerate("ab"):
        randomize(bank.add_new(name, ranks(bank.bare(), settings, shift), settings), shift)
    with bank.use(["a", "b", "a"]):
        mixed = logits(model, family, 3)
    for i, name in enumerate("aba"):
        with bank.use(name):
            torch.testing.assert_close(mixed[i], logits(model, family, 3)[i], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[1], logits(model, family, 3)[1], atol=1e-3)


def test_a_module_that_does_not_read_the_batch_row_by_row_is_refused_in_a_mixed_batch() -> None:
    """DeBERTa projects its relative positions once for the whole batch."""
    model, settings = make(family="deberta_v2"), AdapterSettings()
    bank = AdapterBank(model)
    bank.add_new("a", ranks(bank.bare(), settings, 0), settings)
    with bank.use("a"):
        logits(model, rows=2)
    expected = r"pos_.*: expected an input of 2 rows.*got shape \(1, 64, 16\)"
    with pytest.raises(TargetError, match=expected), bank.use(["a", None]):
        logits(model, rows=2)


def test_one_adapter_has_in_full_what_contains_what_another_adapts() -> None:
    model = make()
    bank = AdapterBank(model)
    whole = AdapterSettings(modules_to_save=["pooler", "classifier"])
    factors = AdapterSettings()
    randomize(bank.add_new("factors", ranks(bank.bare(), factors, 1), factors))
    pooled = bank.add_new("whole", ranks(bank.bare(), whole, 2), whole)
    with torch.no_grad():
        for parameter in pooled.head_parameters():
            parameter.mul_(2)
    assert "bert.pooler.dense" in bank["factors"].layers
    assert bank["whole"].fully_trained == ["bert.pooler", "classifier"]
    with bank.use(["whole", "factors", "whole"]):
        mixed = logits(model, rows=3)
    for i, name in enumerate(["whole", "factors", "whole"]):
        with bank.use(name):
            torch.testing.assert_close(mixed[i], logits(model, rows=3)[i], rtol=1e-5, atol=1e-5)


# Training ------------------------------------------------------------------------------------------------------------


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, inputs_for("bert", 4)).sin().mean().backward()
        optimizer.step()
    model.eval()


def test_an_adapter_trained_in_the_bank_is_the_one_trained_alone() -> None:
    single = trained(make(3), 1)
    bank = AdapterBank(make(2))
    settings = AdapterSettings(seed=1)
    member = bank.add_new("mnli", ranks(bank.bare(), settings, 1), settings, like=make(3))
    assert torch.equal(logits_with(bank, "mnli"), logits(make(3)))  # B starts at 0
    start = trained(make(3), 1).trainable_state()
    member.load_trainable_state(start)
    train(single.model, [p for p in single.model.parameters() if p.requires_grad])
    with bank.use("mnli"):
        train(bank.model, bank.parameters_of("mnli"))
    for name, tensor in single.trainable_state().items():
        assert torch.equal(member.trainable_state()[name], tensor), name


def logits_with(bank: AdapterBank, name: str | None) -> Tensor:
    with bank.use(name):
        return logits(bank.model)


def test_what_one_trains_leaves_the_others_and_the_backbone_bit_identical(bank: AdapterBank) -> None:
    """One optimizer over everything: what has no gradient is left alone, weight decay included."""
    frozen = snapshot(bank.bare())
    others = {name: logits_with(bank, name) for name in ("cola", "mnli", "stsb", None)}
    before = logits_with(bank, "rte")
    trainable = [p for p in bank.model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for name in bank.names for p in bank.parameters_of(name)}
    with bank.use("rte"):
        train(bank.model, trainable)
    assert not torch.allclose(logits_with(bank, "rte"), before, atol=1e-3)
    for name, expected in others.items():
        assert torch.equal(logits_with(bank, name), expected), name
    for name, tensor in snapshot(bank.bare()).items():
        assert torch.equal(tensor, frozen[name]), name


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(bank: AdapterBank) -> None:
    batch, names = inputs_for("bert", 4), ["rte", "cola", "rte", "mnli"]

    def gradients(mixed: bool) -> dict[str, list[Tensor | None]]:
        bank.model.zero_grad()
        if mixed:
            with bank.use(names):
                rows = output(bank.model, batch)
            sum(row[: LABELS[name]].sin().sum() for row, name in zip(rows, names, strict=True)).backward()  # type: ignore[union-attr]
        else:
            for i, name in enumerate(names):
                with bank.use(name):
                    output(bank.model, {key: value[[i]] for key, value in batch.items()}).sin().sum().backward()
        return {name: [p.grad for p in bank.parameters_of(name)] for name in bank.names}

    expected, found = gradients(mixed=False), gradients(mixed=True)
    assert all(gradient is None for gradient in found["stsb"])
    for name in ("rte", "cola", "mnli"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gates_masks_and_removal_of_components_work_on_an_adapter_of_a_bank(bank: AdapterBank) -> None:
    settings = AdapterSettings(seed=3)
    plan = ranks(bank.bare(), settings, 3)
    member = bank.add_new("nested", plan, settings, make_gate=lambda name, rank: PrefixGate(rank))
    randomize(member)
    fewer = RankPlan(plan.sites, {name: min(1, rank) for name, rank in plan.items()})
    full = logits_with(bank, "nested")
    with member.masked(fewer):
        masked = logits_with(bank, "nested")
    assert not torch.allclose(full, masked, atol=1e-3)
    member.keep_first(fewer)
    compact(member)
    torch.testing.assert_close(logits_with(bank, "nested"), masked, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in bank.parameters_of("nested")) == fewer.params + 2 * 16 + 2


# What is kept --------------------------------------------------------------------------------------------------------


def bytes_since_freeze() -> int:
    """Bytes of the tensors that have been made since the collector was told to leave alone what there was."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated things that are asked what they are
        storages = [tensor.untyped_storage() for tensor in gc.get_objects() if issubclass(type(tensor), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_grows_by_factors_masks_and_heads_alone(folders: dict[str, Path]) -> None:
    bank = AdapterBank(make())
    bank.add("rte-0", folders["rte"])
    ranks = sum(bank["rte-0"].attached_plan().values())
    own = sum(p.numel() for p in bank.parameters_of("rte-0"))
    assert own == bank["rte-0"].count()["adapter"] + 2 * 16 + 2
    logits(bank.model)
    gc.freeze()
    try:
        for i in range(1, 9):
            bank.add(f"rte-{i}", folders["rte"])
            with bank.use(f"rte-{i}"):
                logits(bank.model)
        assert bytes_since_freeze() == 8 * 4 * (own + ranks)  # a mask has a float for each component
        for i in range(1, 9):
            bank.remove(f"rte-{i}")
        assert bytes_since_freeze() == 0
    finally:
        gc.unfreeze()


def test_frozen_weights_are_cast_once_for_all_adapters(bank: AdapterBank) -> None:
    batch = inputs_for("bert", 4)
    for name in bank.names:
        with bank.use(name), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            output(bank.model, batch)
    place = "bert.encoder.layer.1.attention.self.value"
    casts = {id(bank[name].layers[place].casts[torch.bfloat16][1]) for name in bank.names if place in bank[name].layers}
    assert len(casts) == 1 < sum(place in bank[name].layers for name in bank.names)


def test_moving_the_model_and_its_mode_reach_every_adapter(bank: AdapterBank) -> None:
    with bank.use("mnli"):
        expected = logits(bank.model)
        bank.model.double()
        found = logits(bank.model)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)
    bank.model.train()
    layers = [layer for name in bank.names for layer in bank[name].layers.values()]
    assert all(layer.training for layer in layers)
    bank.model.eval()
    assert not any(layer.training for layer in layers)


# Many callers --------------------------------------------------------------------------------------------------------


def test_threads_with_different_adapters_do_not_disturb_each_other(bank: AdapterBank, folders: dict[str, Path]) -> None:
    choices = [*LABELS, None, ["rte", "mnli", "rte", "stsb"], "cola", ["mnli"] * 4]

    def say(choice: object, turns: int, start: Barrier | None = None) -> list[Tensor]:
        if start is not None:
            start.wait(timeout=60)
        found = []
        for _ in range(turns):
            with bank.use(choice):  # type: ignore[arg-type]
                found.append(logits(bank.model))
        return found

    expected = [say(choice, 1)[0] for choice in choices]
    start = Barrier(len(choices) + 1)

    def come_and_go() -> None:
        start.wait(timeout=60)
        for i in range(5):
            bank.add(f"new-{i}", folders["stsb"])
            bank.remove(f"new-{i}")

    with ThreadPoolExecutor(len(choices) + 1) as pool:
        others = pool.submit(come_and_go)
        for future, truth in zip([pool.submit(say, choice, 10, start) for choice in choices], expected, strict=True):
            assert all(torch.equal(found, truth) for found in future.result())
        others.result()


def test_tasks_of_asyncio_do_not_disturb_each_other(bank: AdapterBank) -> None:
    async def say(name: str) -> Tensor:
        with bank.use(name):
            await asyncio.sleep(0)  # the others choose now
            return logits(bank.model)

    async def all_at_once() -> list[Tensor]:
        return await asyncio.gather(*map(say, LABELS))

    for name, found in zip(LABELS, asyncio.run(all_at_once()), strict=True):
        assert torch.equal(found, logits_with(bank, name))


def test_a_forward_pass_ends_with_the_adapter_that_it_began_with(bank: AdapterBank) -> None:
    expected = logits_with(bank, "rte")
    middle = bank.model.get_submodule("bert.encoder.layer.1")
    handle = middle.register_forward_pre_hook(lambda *_: bank.remove("rte"))
    assert torch.equal(logits_with(bank, "rte"), expected)
    handle.remove()
    assert "rte" not in bank.names


def test_two_banks_do_not_disturb_each_other(bank: AdapterBank, folders: dict[str, Path]) -> None:
    other = AdapterBank(make())
    other.add("cola", folders["cola"])
    expected = logits_with(bank, "rte"), logits_with(other, "cola")
    with bank.use("rte"), other.use("cola"):
        assert torch.equal(logits(bank.model), expected[0])
        assert torch.equal(logits(other.model), expected[1])


def test_a_copy_of_the_model_has_a_bank_of_its_own(bank: AdapterBank) -> None:
    expected = logits_with(bank, "rte")
    twin = copy.deepcopy(bank)
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.mul_(2)
    assert torch.equal(logits_with(bank, "rte"), expected)
    assert not torch.allclose(logits_with(twin, "rte"), expected)


# On disk, and what is refused ----------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_loaded(bank: AdapterBank, folders: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in folders.items():
        bank.save(name, tmp_path / name)
        theirs, ours = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / name))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
        config, again = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / name))
        assert config == again


def test_an_adapter_of_no_rank_at_all_is_its_head(tmp_path: Path) -> None:
    bank, settings = AdapterBank(make(), base_model="tiny", task_type="SEQ_CLS"), AdapterSettings()
    sites = find_sites(bank.bare(), settings)
    bank.add_new("empty", RankPlan(sites, dict.fromkeys(sites, 0)), settings, like=make(3))
    bank.save("empty", tmp_path / "empty")
    bank.add("again", tmp_path / "empty")
    for name in ("empty", "again"):
        assert torch.equal(logits_with(bank, name), logits(make(3)))
    with bank.use(["empty", None, "empty"]):
        torch.testing.assert_close(logits(bank.model, rows=3)[2], logits(make(3), rows=3)[2])


def test_an_unknown_adapter_is_refused_with_the_names_of_the_known(bank: AdapterBank) -> None:
    for names in ("qqp", ["rte", "qqp"], ["qqp"]):
        with pytest.raises(AdapterError, match=r"unknown adapter 'qqp'.*rte, cola, mnli, stsb"), bank.use(names):
            pass
    for ask in (bank.remove, bank.parameters_of, bank.__getitem__):
        with pytest.raises(AdapterError, match="unknown adapter 'qqp'"):
            ask("qqp")
    with pytest.raises(AdapterError, match="no adapter yet"), AdapterBank(make()).use("rte"):
        pass
    with bank.use("rte"):
        bank.remove("cola")
    with pytest.raises(AdapterError, match=r"'cola'.*has rte, mnli, stsb"), bank.use("cola"):
        pass


def test_adapters_that_cannot_come_in(bank: AdapterBank, folders: dict[str, Path], tmp_path: Path) -> None:
    state = snapshot(bank.model)
    with pytest.raises(AdapterError, match="'rte' already"):
        bank.add("rte", folders["rte"])
    for name in ("", "a.b"):
        with pytest.raises(AdapterError, match="without a dot"):
            bank.add(name, folders["rte"])
    save_peft(trained(make(), 1, bias="lora_only"), tmp_path / "biases", base_model="tiny", task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="trained biases"):
        bank.add("biases", tmp_path / "biases")
    elsewhere = make()
    with torch.no_grad():
        elsewhere.get_submodule("bert.encoder.layer.0.output.dense").weight.mul_(2)
    save_peft(trained(elsewhere, 1), tmp_path / "elsewhere", base_model="other", task_type="SEQ_CLS")
    with pytest.raises(BackboneError, match="trained on another backbone"):
        bank.add("elsewhere", tmp_path / "elsewhere")
    save_peft(trained(tiny_models.make("roberta"), 1), tmp_path / "roberta", base_model="other", task_type="SEQ_CLS")
    with pytest.raises(BackboneError, match="other modules or shapes"):
        bank.add("roberta", tmp_path / "roberta")
    with pytest.raises(DataError, match="adapter_model"):
        bank.add("nowhere", tmp_path)
    with pytest.raises(TargetError, match="already carries adapters"):
        AdapterBank(bank.model)
    assert bank.names == list(LABELS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in snapshot(bank.model).items())
