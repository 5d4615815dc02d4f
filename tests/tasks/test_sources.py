"""Which source is used, that the choice never waits for a network, and what identifies the rows."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from autolora.errors import DataError
from autolora.tasks import sources
from autolora.tasks.glue import GLUE, OFFICIAL_ROWS
from autolora.tasks.records import Split

RTE = GLUE["rte"]


@pytest.fixture(autouse=True)
def no_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "no-datasets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_DATASETS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers HEAD with ``code`` and remembers the paths."""

    code = 200
    paths: list[str]

    def do_HEAD(self) -> None:
        self.paths.append(self.path)
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine."""
    handler = type("Handler", (Hub,), {"paths": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = f"0\t{split} premise\thypothesis\tentailment\n1\tx\ty\tnot_entailment\n"
        (folder / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n{rows}")
    return folder.parent


def test_auto_without_a_network_falls_to_mini_and_says_so(refused: None) -> None:
    resolved = sources.resolve("auto", RTE, None)
    assert resolved.kind == "mini"
    assert "MINI" in resolved.detail
    assert "NOT GLUE" in resolved.detail
    assert "cannot be reached" in resolved.detail
    assert "\n" not in resolved.detail


def test_auto_takes_the_local_folder_first(refused: None, local: Path) -> None:
    resolved = sources.resolve("auto", RTE, local)
    assert (resolved.kind, resolved.folder) == ("local", local)
    assert str(local / "RTE") in resolved.detail
    splits = sources.load(resolved, RTE)
    assert list(splits) == ["train", "dev"]
    assert splits["dev"].text_a == ["dev premise", "x"]


def test_auto_takes_a_hub_that_answers(hub: type[Hub]) -> None:
    resolved = sources.resolve("auto", RTE, None)
    assert resolved.kind == "hub"
    assert constants.ENDPOINT in resolved.detail
    assert hub.paths == ["/api/datasets/nyu-mll/glue"]


@pytest.mark.parametrize("code", [403, 404, 503])
def test_auto_does_not_trust_a_hub_that_answers_with_an_error(hub: type[Hub], code: int) -> None:
    hub.code = code
    resolved = sources.resolve("auto", RTE, None)
    assert resolved.kind == "mini"
    assert f"answered {code}" in resolved.detail


def test_cache_comes_before_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "cached_hub_files", lambda task, split: [Path(f"{split}.arrow")])
    monkeypatch.setattr(sources, "probe_hub", lambda: pytest.fail("asked the network for what is cached"))
    assert sources.resolve("auto", RTE, None).kind == "hub"
    assert "cache" in sources.resolve("hub", RTE, None).detail


def test_cache_that_lacks_a_split_is_not_enough(refused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {"train": [Path("train.arrow")], "dev": [Path("dev.arrow")], "dev_mismatched": []}
    monkeypatch.setattr(sources, "cached_hub_files", lambda task, split: cached[split])
    assert sources.resolve("auto", GLUE["mnli"], None).kind == "mini"
    assert sources.resolve("auto", RTE, None).kind == "hub"


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_mode_is_honoured_without_a_request(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    if switch == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv(switch, "1")
    resolved = sources.resolve("auto", RTE, None)
    assert resolved.kind == "mini"
    assert "offline mode" in resolved.detail
    assert hub.paths == []


def test_an_endpoint_that_is_no_address_is_a_problem_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    assert sources.resolve("auto", RTE, None).kind == "mini"


def test_explicit_hub_that_cannot_be_reached_is_an_error(refused: None) -> None:
    with pytest.raises(DataError, match=r"data\.source=hub.*cannot be reached.*data\.source=mini"):
        sources.resolve("hub", RTE, None)


def test_explicit_local_without_a_folder_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.source=local needs data\.dir"):
        sources.resolve("local", RTE, None)


@pytest.mark.parametrize("source", ["local", "auto"])
def test_a_folder_that_was_given_is_used_or_is_an_error(hub: type[Hub], local: Path, source: str) -> None:
    with pytest.raises(DataError, match="no folder for mrpc"):
        sources.resolve(source, GLUE["mrpc"], local)
    (local / "RTE" / "dev.tsv").unlink()
    with pytest.raises(DataError, match=r"no file dev\.tsv"):
        sources.resolve(source, RTE, local)
    assert hub.paths == []


def test_unknown_source() -> None:
    with pytest.raises(DataError, match=r"data\.source=web is unknown; expected one of auto, local, hub, mini"):
        sources.resolve("web", RTE, None)


def test_a_hub_that_fails_after_the_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: object, split: str) -> Split:
        raise DataError(f"cannot read {split}")

    monkeypatch.setattr(sources, "read_hub", fail)
    with pytest.raises(DataError, match="cannot read train"):
        sources.load(sources.ResolvedSource("hub", ""), RTE)


def test_mini_generates_every_split_with_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(name: str, split: str, seed: int = 1) -> Split:
        asked.append((name, split, seed))
        return SPLIT

    monkeypatch.setitem(sys.modules, "autolora.tasks.mini", types.SimpleNamespace(generate=generate))
    resolved = sources.resolve("mini", GLUE["mnli"], None)
    assert "MINI" in resolved.detail
    assert list(sources.load(resolved, GLUE["mnli"])) == ["train", "dev", "dev_mismatched"]
    assert asked == [("mnli", "train", 0), ("mnli", "dev", 0), ("mnli", "dev_mismatched", 0)]


SPLIT = Split(["a", "b"], ["c", "d"], [0, 1], [0, 1])


def test_fingerprint_is_stable() -> None:
    # A changed fingerprint orphans every finished run: change this value only together with a reason to.
    assert sources.fingerprint({"train": SPLIT}) == "ac89d730fd91"


def test_fingerprint_ignores_layout() -> None:
    value = sources.fingerprint({"train": SPLIT, "dev": SPLIT.take([0])})
    renumbered = replace(SPLIT, ids=[7, 9], skipped=3)
    assert sources.fingerprint({"dev": SPLIT.take([0]), "train": renumbered}) == value


@pytest.mark.parametrize(
    "other",
    [
        SPLIT.take([1, 0]),
        SPLIT.take([0]),
        replace(SPLIT, labels=[0, 0]),
        replace(SPLIT, text_a=["a", "b "]),
        replace(SPLIT, text_b=["d", "c"]),
        replace(SPLIT, text_b=None),
        Split(["ac", "b"], ["", "d"], [0, 1], [0, 1]),
    ],
)
def test_fingerprint_sees_content_and_order(other: Split) -> None:
    assert sources.fingerprint({"train": other}) != sources.fingerprint({"train": SPLIT})


def test_fingerprint_sees_which_split_is_which() -> None:
    one, two = SPLIT.take([0]), SPLIT.take([1])
    assert sources.fingerprint({"train": one, "dev": two}) != sources.fingerprint({"train": two, "dev": one})


def test_fingerprint_of_scores_is_that_of_their_float32() -> None:
    exact = Split(["a"], ["b"], [3.8], [0])
    assert sources.fingerprint({"train": exact}) == sources.fingerprint(
        {"train": replace(exact, labels=[3.799999952316284])}
    )
    assert sources.fingerprint({"train": exact}) != sources.fingerprint({"train": replace(exact, labels=[3.801])})


def test_a_file_cut_at_the_end_of_a_row_is_noticed_by_its_size() -> None:
    task = GLUE["mnli"]
    whole = {
        name: Split([""] * rows, None, [0] * rows, list(range(rows)))
        for name, rows in zip(task.splits, OFFICIAL_ROWS["mnli"], strict=True)
    }
    local = sources.ResolvedSource("local", "", Path())
    assert sources.size_notes(local, task, whole) == []
    part = whole | {"train": Split([""] * 7, None, [0] * 7, list(range(7)))}
    assert sources.size_notes(local, task, part) == [
        "mnli train: 7 rows, GLUE has 392,702: part of it, or a truncated file"
    ]
    assert sources.size_notes(sources.ResolvedSource("mini", ""), task, part) == []
