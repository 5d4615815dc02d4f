"""Readers of GLUE files: every layout, every quirk that is tolerated, and every fault that is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autolora.errors import DataError
from autolora.tasks.glue import GLUE, OFFICIAL_ROWS
from autolora.tasks.readers import cached_hub_files, find_local, read_hub, read_local
from autolora.tasks.records import Split

PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
MNLI_12 = ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2", "label1", "gold_label"]
MNLI_16 = [*MNLI_12[:-1], "label2", "label3", "label4", "label5", "gold_label"]
HEADERS = {
    "sst2": ["sentence", "label"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "stsb": [
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ],
    "qqp": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "mnli": ["index", "sentence1", "sentence2", "gold_label"],
    "qnli": ["index", "question", "sentence", "label"],
    "rte": ["index", "sentence1", "sentence2", "label"],
    "wnli": ["index", "sentence1", "sentence2", "label"],
}


def write(root: Path, task: str, rows: list[list[str]], split: str = "train", header: list[str] | None = None) -> Path:
    """A TSV file of a task; CoLA has no header."""
    lines = rows if task == "cola" else [header or HEADERS[task], *rows]
    return write_text(root, task, "".join("\t".join(line) + "\n" for line in lines), split)


def write_text(root: Path, task: str, text: str, split: str = "train") -> Path:
    folder = root / GLUE[task].folder
    folder.mkdir(exist_ok=True)
    name = "dev_matched" if (task, split) == ("mnli", "dev") else split
    path = folder / f"{name}.tsv"
    path.write_bytes(text.encode())
    return path


def read(root: Path, task: str, split: str = "train") -> Split:
    return read_local(GLUE[task], root, split)


LAYOUTS = {
    "cola": [["gj04", "1", "", "A rose."], ["gj04", "0", "*", "Rose a."]],
    "sst2": [["bad . ", "0"], ["good . ", "1"]],
    "mrpc": [["0", "7", "8", "One.", "Two."], ["1", "7", "8", "Three.", "3."]],
    "qqp": [["5", "1", "2", "Why?", "How?", "0"], ["6", "3", "4", "Who?", "Who is it?", "1"]],
    "qnli": [["0", "Who?", "She did.", "entailment"], ["1", "When?", "No one.", "not_entailment"]],
    "rte": [["0", "Rain falls.", "It is wet.", "entailment"], ["1", "Sun.", "Rain.", "not_entailment"]],
    "wnli": [["0", "It fell.", "The cup fell.", "0"], ["1", "It broke.", "The cup broke.", "1"]],
    "mnli": [["0", "A.", "B.", "entailment"], ["1", "C.", "D.", "neutral"], ["2", "E.", "F.", "contradiction"]],
}
TEXTS = {
    "cola": (["A rose.", "Rose a."], None),
    "sst2": (["bad . ", "good . "], None),
    "mrpc": (["One.", "Three."], ["Two.", "3."]),
    "qqp": (["Why?", "Who?"], ["How?", "Who is it?"]),
    "qnli": (["Who?", "When?"], ["She did.", "No one."]),
    "rte": (["Rain falls.", "Sun."], ["It is wet.", "Rain."]),
    "wnli": (["It fell.", "It broke."], ["The cup fell.", "The cup broke."]),
    "mnli": (["A.", "C.", "E."], ["B.", "D.", "F."]),
}
LABELS = {"cola": [1, 0], "mnli": [0, 1, 2], "qnli": [0, 1], "rte": [0, 1]}


@pytest.mark.parametrize("task", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_layout_of_each_classification_task(tmp_path: Path, task: str, split: str) -> None:
    write(tmp_path, task, LAYOUTS[task], split)
    rows = read(tmp_path, task, split)
    assert (rows.text_a, rows.text_b) == TEXTS[task]
    assert rows.labels == LABELS.get(task, [0, 1])
    assert rows.ids == list(range(len(rows)))
    assert rows.skipped == 0


def test_stsb_layout_and_scores(tmp_path: Path) -> None:
    rest = ["0", "news", "f", "2012", "1", "none", "none"]
    write(tmp_path, "stsb", [[*rest, "A.", "B.", "3.800"], [*rest, "C.", "D.", "0"], [*rest, "E.", "F.", "5"]])
    rows = read(tmp_path, "stsb")
    assert rows.labels == [3.8, 0.0, 5.0]
    assert all(isinstance(label, float) for label in rows.labels)
    assert rows.text_b == ["B.", "D.", "F."]


@pytest.mark.parametrize("header", [MNLI_12, MNLI_16], ids=["train", "dev"])
def test_official_mnli_and_rows_without_majority(tmp_path: Path, header: list[str]) -> None:
    def row(premise: str, gold: str) -> list[str]:
        cells = dict.fromkeys(header, "neutral") | {"sentence1": premise, "sentence2": "H", "gold_label": gold}
        return [cells[name] for name in header]

    write(tmp_path, "mnli", [row("a", "contradiction"), row("b", "-"), row("c", "entailment")], header=header)
    rows = read(tmp_path, "mnli")
    assert (rows.text_a, rows.labels) == (["a", "c"], [2, 0])
    assert rows.ids == [0, 2]
    assert rows.skipped == 1


def test_mnli_devs_are_two_files(tmp_path: Path) -> None:
    write(tmp_path, "mnli", [["0", "matched", "h", "neutral"]], "dev")
    write(tmp_path, "mnli", [["0", "mismatched", "h", "neutral"]], "dev_mismatched")
    assert read(tmp_path, "mnli", "dev").text_a == ["matched"]
    assert read(tmp_path, "mnli", "dev_mismatched").text_a == ["mismatched"]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    header = ["label", "note", "sentence2", "sentence1"]
    write(tmp_path, "rte", [["not_entailment", "x", "hypothesis", "premise"]], header=header)
    rows = read(tmp_path, "rte")
    assert (rows.text_a, rows.text_b, rows.labels) == (["premise"], ["hypothesis"], [1])


def test_quotes_and_odd_line_breaks_are_ordinary_characters(tmp_path: Path) -> None:
    texts = ['" He said', 'it "was" \'so', "a\u2028b\x0bc\rd\x85e", '"', ""]
    write(tmp_path, "sst2", [[text, "1"] for text in texts])
    assert read(tmp_path, "sst2").text_a == texts


@pytest.mark.parametrize("task", ["mrpc", "cola"])
def test_byte_order_mark_crlf_and_trailing_blank_lines(tmp_path: Path, task: str) -> None:
    path = write(tmp_path, task, LAYOUTS[task])
    plain = read(tmp_path, task)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read(tmp_path, task) == plain


def test_no_final_line_end_is_fine(tmp_path: Path) -> None:
    path = write(tmp_path, "sst2", LAYOUTS["sst2"])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(read(tmp_path, "sst2")) == 2


@pytest.mark.parametrize("folder", ["STS-B", "sts-b", "stsb", "STSB"])
def test_folder_and_file_names_in_any_case(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "Train.TSV").write_text("sentence1\tsentence2\tscore\na\tb\t1.5\n")
    assert read(tmp_path, "stsb").labels == [1.5]


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.dir=.*nowhere is not a folder.*CoLA"):
        read(tmp_path / "nowhere", "cola")


def test_missing_folder_says_what_was_sought_and_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "rte", LAYOUTS["rte"])
    with pytest.raises(DataError, match=r"no folder for mrpc: looked for 'MRPC' or 'mrpc'.*it holds: RTE"):
        read(tmp_path, "mrpc")


def test_missing_file_says_what_was_sought_and_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "mnli", LAYOUTS["mnli"])
    with pytest.raises(DataError, match=r"no file dev_matched\.tsv.*it holds: train\.tsv"):
        find_local(GLUE["mnli"], tmp_path, "dev")


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rte has no split 'test'; expected one of train, dev"):
        read(tmp_path, "rte", "test")


@pytest.mark.parametrize(
    ("cells", "problem"), [(["1", "just one"], "too few"), (["1", "a", "b", "entailment", "?"], "too many")]
)
def test_wrong_number_of_columns_names_file_and_line(tmp_path: Path, cells: list[str], problem: str) -> None:
    good = ["0", "a", "b", "entailment"]
    write(tmp_path, "rte", [good, cells, good])
    with pytest.raises(DataError, match=rf"RTE.train\.tsv, line 3: {problem} columns: expected 4 .*found {len(cells)}"):
        read(tmp_path, "rte")


def test_short_row_in_a_file_without_header(tmp_path: Path) -> None:
    write(tmp_path, "cola", [["gj04", "1", "", "Fine."], ["gj04", "1"], ["gj04", "1", "", "Fine."]])
    with pytest.raises(DataError, match=r"CoLA.train\.tsv, line 2: too few columns.*source, label, mark, sentence"):
        read(tmp_path, "cola")


def test_blank_line_between_rows_is_a_short_row(tmp_path: Path) -> None:
    write_text(tmp_path, "sst2", "sentence\tlabel\nx\t1\n\ny\t0\n")
    with pytest.raises(DataError, match=r"line 3: too few columns"):
        read(tmp_path, "sst2")


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_truncated_file(tmp_path: Path, task: str) -> None:
    path = write(tmp_path, task, LAYOUTS[task] * 1000)
    path.write_bytes(path.read_bytes()[: -len("\t".join(LAYOUTS[task][-1])) + 3])
    with pytest.raises(DataError, match=r"train\.tsv, line 2001: too few columns.*may be truncated"):
        read(tmp_path, task)


def test_broken_qqp_records_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = ["5", "1", "2", "Why?", "How?", "0"]
    fragments = [["6", "3", "4", '"A question'], ['broken"', "Another", "1"]]
    write(tmp_path, "qqp", [*[good] * 1500, *fragments, *[good] * 1500])
    rows = read(tmp_path, "qqp")
    assert (len(rows), rows.skipped) == (3000, 2)
    assert rows.ids[1499:1501] == [1499, 1502]
    assert "left out 2 of 3002 rows" in caplog.text


def test_many_broken_qqp_records_are_a_damaged_file(tmp_path: Path) -> None:
    write(tmp_path, "qqp", [["6", "3", "4", "half"], *LAYOUTS["qqp"]])
    with pytest.raises(DataError, match=r"QQP.train\.tsv, line 2: too few columns"):
        read(tmp_path, "qqp")


@pytest.mark.parametrize(
    ("task", "row", "allowed"),
    [
        ("rte", ["1", "a", "b", "entailed"], "allowed values: entailment, not_entailment"),
        ("rte", ["1", "a", "b", "-"], "allowed values: entailment, not_entailment"),
        ("rte", ["1", "a", "b", "0"], "allowed values: entailment, not_entailment"),
        ("mnli", ["1", "a", "b", "not_entailment"], "allowed values: entailment, neutral, contradiction"),
        ("sst2", ["a", "2"], r"allowed values: 0 \(negative\), 1 \(positive\)"),
        ("sst2", ["a", "-1"], r"allowed values: 0 \(negative\), 1 \(positive\)"),
        ("mrpc", ["", "1", "2", "a", "b"], r"allowed values: 0 \(not_equivalent\), 1 \(equivalent\)"),
    ],
)
def test_unknown_label_names_file_line_and_allowed_values(
    tmp_path: Path, task: str, row: list[str], allowed: str
) -> None:
    write(tmp_path, task, [*LAYOUTS[task], row])
    with pytest.raises(DataError, match=rf"train\.tsv, line {len(LAYOUTS[task]) + 2}: .* is '.*'; {allowed}"):
        read(tmp_path, task)


@pytest.mark.parametrize("score", ["5.01", "-0.1", "nan", "inf", "high", ""])
def test_score_out_of_range(tmp_path: Path, score: str) -> None:
    header = ["sentence1", "sentence2", "score"]
    write(tmp_path, "stsb", [["a", "b", "1"], ["a", "b", score]], header=header)
    with pytest.raises(DataError, match=r"train\.tsv, line 3: score is '.*'; expected a number from 0 to 5"):
        read(tmp_path, "stsb")


def test_header_lacks_a_column(tmp_path: Path) -> None:
    write(tmp_path, "mnli", [["0", "a", "b", "neutral"]], header=["index", "sentence1", "sentence2", "label"])
    with pytest.raises(DataError, match=r"header \(line 1\) lacks the column\(s\) 'gold_label'.*found 'index'"):
        read(tmp_path, "mnli")


@pytest.mark.parametrize("text", ["", "\n", "sentence\tlabel\n", "\ufeffsentence\tlabel\r\n\r\n"])
def test_empty_split(tmp_path: Path, text: str) -> None:
    path = write_text(tmp_path, "sst2", text)
    with pytest.raises(DataError, match=r"train split of sst2 is empty") as caught:
        read(tmp_path, "sst2")
    assert str(path) in str(caught.value)


def test_empty_cola(tmp_path: Path) -> None:
    write_text(tmp_path, "cola", "")
    with pytest.raises(DataError, match="train split of cola is empty"):
        read(tmp_path, "cola")


def test_split_without_any_gold_label_is_empty(tmp_path: Path) -> None:
    write(tmp_path, "mnli", [["0", "a", "b", "-"]])
    with pytest.raises(DataError, match="none of its 1 rows has a label"):
        read(tmp_path, "mnli")


def test_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "sst2", [["fine", "1"], ["caf\u00e9", "1"]])
    path.write_bytes(path.read_bytes().decode().encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.tsv, line 3: not UTF-8"):
        read(tmp_path, "sst2")


class TestHub:
    """The caches of the hub, written by the ``datasets`` library itself; nothing here can reach a network."""

    @pytest.fixture(autouse=True)
    def caches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def write_parquet(self, folder: Path, task: str, splits: dict[str, list[float]], names: list[str] | None) -> None:
        import datasets

        label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
        fields = GLUE[task].fields
        features = datasets.Features({**{field: datasets.Value("string") for field in fields}, "label": label})
        (folder / task).mkdir(parents=True)
        for split, labels in splits.items():
            columns = {field: [f"{field} {split} {i}" for i in range(len(labels))] for field in fields}
            rows = datasets.Dataset.from_dict({**columns, "label": labels}, features=features)
            rows.to_parquet(folder / task / f"{split}-00000-of-00001.parquet")

    def snapshot(self, tmp_path: Path) -> Path:
        return tmp_path / "hub" / "datasets--nyu-mll--glue" / "snapshots" / "abc"

    def test_nothing_cached(self) -> None:
        assert cached_hub_files(GLUE["mrpc"], "train") == []

    def test_cache_of_load_dataset(self, tmp_path: Path) -> None:
        import datasets

        self.write_parquet(tmp_path / "glue", "rte", {"train": [1, 0, 1], "validation": [0]}, list(GLUE["rte"].labels))
        config = "configs:\n- config_name: rte\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: rte/{split}-*\n" for split in ("train", "validation")
        )
        (tmp_path / "glue" / "README.md").write_text(f"---\n{config}---\n")
        datasets.load_dataset(str(tmp_path / "glue"), "rte", cache_dir=str(tmp_path / "datasets"))
        # All that the same data set loaded from the hub would change is the owner in the folder's name.
        (tmp_path / "datasets" / "glue").rename(tmp_path / "datasets" / "nyu-mll___glue")
        assert [file.suffix for file in cached_hub_files(GLUE["rte"], "train")] == [".arrow"]
        rows = read_hub(GLUE["rte"], "train")
        assert rows.labels == [1, 0, 1]
        assert (rows.text_a[2], rows.text_b[2]) == ("sentence1 train 2", "sentence2 train 2")
        assert read_hub(GLUE["rte"], "dev").text_a == ["sentence1 validation 0"]

    def test_snapshot_in_the_hub_cache_and_mnli_split_names(self, tmp_path: Path) -> None:
        splits = {"train": [0, 2], "validation_matched": [1], "validation_mismatched": [2]}
        self.write_parquet(self.snapshot(tmp_path), "mnli", splits, list(GLUE["mnli"].labels))
        assert read_hub(GLUE["mnli"], "train").labels == [0, 2]
        assert read_hub(GLUE["mnli"], "dev").text_a == ["premise validation_matched 0"]
        assert read_hub(GLUE["mnli"], "dev_mismatched").text_b == ["hypothesis validation_mismatched 0"]

    def test_scores_stored_in_float32_are_the_scores_of_the_files(self, tmp_path: Path) -> None:
        self.write_parquet(self.snapshot(tmp_path), "stsb", {"train": [3.8, 2.917, 5.0]}, None)
        assert read_hub(GLUE["stsb"], "train").labels == [3.8, 2.917, 5.0]

    def test_incomplete_shards_are_not_a_cache(self, tmp_path: Path) -> None:
        folder = self.snapshot(tmp_path) / "rte"
        folder.mkdir(parents=True)
        (folder / "train-00000-of-00002.parquet").touch()
        assert cached_hub_files(GLUE["rte"], "train") == []

    def test_other_order_of_classes_is_refused(self, tmp_path: Path) -> None:
        self.write_parquet(self.snapshot(tmp_path), "rte", {"train": [0]}, ["not_entailment", "entailment"])
        with pytest.raises(DataError, match=r"orders its classes .*expected \['entailment', 'not_entailment'\]"):
            read_hub(GLUE["rte"], "train")

    @pytest.mark.parametrize(("task", "label"), [("rte", -1), ("stsb", 5.5)])
    def test_label_out_of_range(self, tmp_path: Path, task: str, label: float) -> None:
        self.write_parquet(self.snapshot(tmp_path), task, {"train": [1, label]}, list(GLUE[task].labels or ()))
        with pytest.raises(DataError, match=rf"nyu-mll/glue \({task}, train\), row 1: label {label}"):
            read_hub(GLUE[task], "train")

    def test_damaged_cache_names_the_file(self, tmp_path: Path) -> None:
        folder = self.snapshot(tmp_path) / "rte"
        folder.mkdir(parents=True)
        (folder / "train-00000-of-00001.parquet").write_bytes(b"nonsense")
        with pytest.raises(DataError, match=r"cannot read rte \(train\) from the cached .*parquet: Arrow"):
            read_hub(GLUE["rte"], "train")

    def test_download_goes_through_load_dataset_and_its_failure_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        asked = []

        def refuse(name: str, config: str, split: str) -> None:
            asked.append((name, config, split))
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(DataError, match=r"from the hub: ConnectionError: no route; .*data\.source=mini"):
            read_hub(GLUE["mnli"], "dev")
        assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]


REAL = os.environ.get("AUTOLORA_GLUE_DIR")


@pytest.mark.skipif(REAL is None, reason="AUTOLORA_GLUE_DIR does not name a folder of real GLUE files")
@pytest.mark.parametrize("task", OFFICIAL_ROWS)
def test_row_counts_of_the_real_files(task: str) -> None:
    root = Path(REAL or "")
    try:
        find_local(GLUE[task], root, "train")
    except DataError as error:
        pytest.skip(str(error))
    train, dev = read(root, task, "train"), read(root, task, "dev")
    assert len(dev) == OFFICIAL_ROWS[task][1]
    # MNLI's training file is often sub-sampled for its size.
    assert len(train) == OFFICIAL_ROWS[task][0] or (task == "mnli" and len(train) < OFFICIAL_ROWS[task][0])
