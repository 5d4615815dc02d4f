"""The gate: what it mixes is what the formula says, only it is trained, and it finds out whose input it sees."""

from __future__ import annotations

import pytest
import torch
from adapters.tiny_models import inputs_for, output, randomize, snapshot
from multitask.small_bank import make, ranks
from multitask.toy_tasks import ToyTask, labelled, tokens
from torch import Tensor, nn

from autolora.adapters import AdapterSettings, find_sites
from autolora.errors import AdapterError
from autolora.multitask.bank import AdapterBank
from autolora.multitask.router import MeanEmbedding, Router, compare, routed, train, weights_on, with_head
from autolora.plan import RankPlan


@pytest.fixture
def bank() -> AdapterBank:
    """Two adapters with ranks 0 to 3 and heads that are sure of what they say; tokens of two kinds."""
    model = make()
    with torch.no_grad():
        table = model.get_submodule("bert.embeddings.word_embeddings").weight
        table[:32, 0] += 1
        table[32:, 0] -= 1
    bank = AdapterBank(model)
    for seed, name in enumerate("ab", 1):
        settings = AdapterSettings(seed=seed)
        adapters = bank.add_new(name, ranks(bank.bare(), settings, seed), settings)
        randomize(adapters, seed)
        with torch.no_grad():
            for parameter in adapters.head_parameters():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return bank


@pytest.fixture
def tasks(bank: AdapterBank) -> dict[str, ToyTask]:
    """Each adapter is right about its own task, half of the rows are of each class, and tokens tell the tasks apart."""
    found = {}
    for name, low, high, seed in (("a", 1, 32, 3), ("b", 32, 64, 4)):
        ids = tokens(low, high, 96, seed)
        weight, bias = bank[name].head_parameters()
        with torch.no_grad(), bank.use(name):
            scores = bank.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            margin = scores[:, 1] - scores[:, 0]
            weight.mul_(5 / margin.std())
            bias.copy_((bias - torch.tensor([0.0, 1.0]) * margin.median()) * 5 / margin.std())
            found[name] = labelled(name, bank.model, ids)
        assert 40 < int(found[name].labels_of_all.sum()) < 56
    return found


def logits(bank: AdapterBank, model: nn.Module | None = None) -> Tensor:
    return output(bank.model if model is None else model, inputs_for("bert", 4))


def test_weights_of_one_and_nought_are_the_adapter_alone(bank: AdapterBank) -> None:
    bank.model.double()
    for k, name in enumerate("ab"):
        with torch.no_grad():
            with bank.blend("ab", torch.eye(2)[[k] * 4].double(), name):
                blended = logits(bank)
            with bank.use(name):
                torch.testing.assert_close(blended, logits(bank), rtol=1e-12, atol=1e-12)
    with torch.no_grad(), bank.blend("ab", torch.eye(2)[[0, 1, 1, 0]].double(), ["a", "b", "b", "a"]):
        blended = logits(bank)
    with torch.no_grad(), bank.use(["a", "b", "b", "a"]):
        torch.testing.assert_close(blended, logits(bank), rtol=1e-12, atol=1e-12)


def test_one_module_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    bank, settings = AdapterBank(model), AdapterSettings(scale=0.5, modules_to_save=[])
    sites = find_sites(bank.bare(), settings)
    for seed, name in enumerate("ab"):
        randomize(bank.add_new(name, RankPlan(sites, {"0": seed + 1}), settings), seed)
    x, pi = torch.randn(4, 5, 3), torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    with bank.blend("ab", pi):
        found = model(x)
    w, bias = model[0].base_layer.weight, model[0].base_layer.bias
    for i in range(4):
        expected = x[i] @ w.T + bias
        for k, name in enumerate("ab"):
            layer = bank[name].layers["0"]
            expected = expected + pi[i, k] * 0.5 * (x[i] @ layer.lora_A.T @ layer.lora_B.T)
        torch.testing.assert_close(found[i], expected)


def test_an_untrained_gate_gives_equal_weights(bank: AdapterBank) -> None:
    router = Router(bank, ["a", "b"])
    torch.testing.assert_close(router(**inputs_for("bert", 4)), torch.full((4, 2), 0.5))
    with torch.no_grad():
        soft = logits(bank, routed(router, "a", "soft"))
        assert torch.equal(soft, logits(bank, routed(router, "a", "uniform")))
        router.gate.bias.copy_(torch.tensor([0.0, 1.0]))
        assert router(**inputs_for("bert", 4), how="hard").tolist() == [[0.0, 1.0]] * 4
        torch.testing.assert_close(logits(bank, routed(router, "b", "hard")), logits(bank, with_head(bank, "b", "b")))
        torch.testing.assert_close(logits(bank, routed(router, "a", "hard")), logits(bank, with_head(bank, "b", "a")))


def test_the_summary_is_the_mean_over_what_is_no_padding(bank: AdapterBank) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [5, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    table = bank.model.get_submodule("bert.embeddings.word_embeddings").weight
    found = MeanEmbedding(bank.model)(input_ids=ids, attention_mask=mask, token_type_ids=mask)
    torch.testing.assert_close(found, torch.stack([(table[5] + table[6] + table[7]) / 3, table[5]]))


def test_only_the_gate_is_trained(bank: AdapterBank, tasks: dict[str, ToyTask]) -> None:
    before, router = snapshot(bank.model), Router(bank, ["a", "b"])
    train(router, tasks, steps=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(bank.model).items())
    assert all(p.grad is None for p in bank.model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())
    assert len(list(router.parameters())) == 2
    assert not bank.model.training


def test_the_gate_learns_whose_input_it_sees(bank: AdapterBank, tasks: dict[str, ToyTask]) -> None:
    router = Router(bank, ["a", "b"])
    losses = train(router, tasks, steps=60, lr=3e-2)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    for k, name in enumerate("ab"):
        weights = weights_on(router, tasks[name])
        assert weights.shape == (96, 2)
        assert (weights.argmax(1) == k).float().mean() > 0.95
    scores = {task: {way: found.value for way, found in ways.items()} for task, ways in compare(router, tasks).items()}
    for task, other in (("a", "b"), ("b", "a")):
        assert scores[task].keys() == {"own", "soft", "hard", "uniform", f"as {other}"}
        assert scores[task]["own"] > 0.98  # the row of the median margin can fall on either side
        assert scores[task]["hard"] > 0.95
        assert scores[task]["soft"] > max(scores[task]["uniform"], scores[task][f"as {other}"])


def test_routers_that_cannot_be(bank: AdapterBank) -> None:
    with pytest.raises(AdapterError, match="at least two adapters"):
        Router(bank, ["a"])
    with pytest.raises(AdapterError, match=r"unknown adapter 'c'.*a, b"):
        Router(bank, ["a", "c"])
    with (
        pytest.raises(ValueError, match=r"expected shape \(rows, 2\), got \(4, 3\)"),
        bank.blend("ab", torch.ones(4, 3)),
    ):
        pass
