"""The embedded data: pure, balanced, disjoint, and closed to every shortcut."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from functools import cache
from random import Random

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from scipy.stats import pearsonr
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, matthews_corrcoef

from autolora.errors import DataError
from autolora.tasks.glue import GLUE
from autolora.tasks.mini import (
    SIZES,
    acceptability,
    answers,
    generate,
    inference,
    paraphrase,
    pronouns,
    rows,
    sentiment,
)
from autolora.tasks.mini.design import Claim, Space, latin
from autolora.tasks.mini.design import inference as inference_of
from autolora.tasks.mini.grammar import fill
from autolora.tasks.mini.lexicon import LEXICON, words
from autolora.tasks.mini.paraphrase import Scheme
from autolora.tasks.records import Split

PAIRS = [name for name, task in GLUE.items() if len(task.fields) == 2]
SPLITS = [(name, split) for name, task in GLUE.items() for split in ("train", "dev", *task.extra_dev)]

# SHA-256 of all splits of a task, seed 0: a change of the rows is a change of every number measured on them.
PINNED = {
    "cola": "b26caf46d6ca9709eeab50c3f8a9ddf25dfe00edf5b8103d19ad81690fcad6c1",
    "sst2": "7a92de25fb3463473b8689047c71c57c9838d58328a84d23b8ef4b9e29174678",
    "mrpc": "3ecfc634cbf601817786fbc8b711991499d5b54bfa337b55d7f4f784832186b9",
    "stsb": "bbab0c23556f826de999effbe6aef76d36fffa5c75647027329a856f94357b74",
    "qqp": "631f798d97021d9be5b2badd096081d2b27e7b8a5ffac55b4f4cd23bb4869e62",
    "mnli": "b7d2d5125ddb0bce02fe2802572db7e0002ed44e6de37ea0e9211e9193c2268c",
    "qnli": "a6282f1078264979adaa65f1bc3d2ab7ff62c745be168dfb94bcb029c8115aa3",
    "rte": "2753003efeb7887b6dd694de51e0a3ed24dd587be3a1f1e4a84683d188992cbd",
    "wnli": "8f6c167fccdeac021905ebcbd8c088b6d159dd48a158f58b6162b765a291c6b0",
}

# Closed-class words, and the few words of templates, that train and dev may share.
CLOSED = frozenset(
    words(
        """
        a ago all an and any are at be because both but by did every for from had has he herself himself how i in is it
        last least many my near never next no nobody none not now of on one out really said say she some somebody
        someone still than that the there these they this those three to two very was were what when where who why will
        with would
        """
    )
)


@cache
def made(task: str, split: str) -> Split:
    """One generation for all tests."""
    return generate(task, split)


def texts(split: Split) -> list[str]:
    return [*split.text_a, *(split.text_b or [])]


def vocabulary(split: Split) -> set[str]:
    return {word for text in texts(split) for word in re.findall(r"[a-z'-]+", text.lower())}


def pairs(split: Split) -> list[tuple[str, str]]:
    return list(zip(split.text_a, split.text_b or [""] * len(split), strict=True))


def digest(task: str) -> str:
    lines = [
        f"{split}\t{a}\t{b}\t{label}"
        for name, split in SPLITS
        if name == task
        for data in [made(task, split)]
        for (a, b), label in zip(pairs(data), data.labels, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("task", GLUE)
def test_the_rows_are_the_same_on_every_machine(task: str) -> None:
    assert digest(task) == PINNED[task]


def test_another_seed_makes_other_rows() -> None:
    first, second = made("mnli", "dev"), generate("mnli", "dev", seed=1)
    assert len(set(pairs(first)) & set(pairs(second))) < len(first) // 10


@pytest.mark.parametrize(("task", "split"), SPLITS)
def test_sizes_labels_and_ids(task: str, split: str) -> None:
    data = made(task, split)
    assert SIZES[split] <= len(data) < SIZES[split] + 32
    assert data.ids == list(range(len(data)))
    assert (data.text_b is None) == (len(GLUE[task].fields) == 1)
    assert all(text[0] == text[0].upper() and text[-1] in ".?" and "  " not in text for text in texts(data))
    if GLUE[task].regression:
        assert all(isinstance(label, float) for label in data.labels)
        assert (min(data.labels), max(data.labels)) == (0.0, 5.0)
        assert np.mean(data.labels) == pytest.approx(2.5, abs=0.01)
    else:
        counts = Counter(data.labels)
        assert counts == dict.fromkeys(range(GLUE[task].num_labels), len(data) // GLUE[task].num_labels)


@pytest.mark.parametrize("task", PAIRS)
@pytest.mark.parametrize("field", ["text_a", "text_b"])
def test_every_sentence_of_a_pair_goes_with_every_label_equally(task: str, field: str) -> None:
    data = made(task, "train")
    labels_of: defaultdict[str, list[float]] = defaultdict(list)
    for text, label in zip(getattr(data, field), data.labels, strict=True):
        labels_of[text].append(label)
    for labels in labels_of.values():
        if GLUE[task].regression:
            assert np.mean(labels) == pytest.approx(2.5, abs=0.01)
        else:
            assert len(set(Counter(labels).values())) == 1
            assert len(set(labels)) == GLUE[task].num_labels


@pytest.mark.parametrize("task", ["cola", "sst2"])
def test_every_word_of_a_single_sentence_goes_with_both_labels_equally(task: str) -> None:
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    data = made(task, "train")
    for text, label in zip(data.text_a, data.labels, strict=True):
        counts[int(label)].update(re.findall(r"[\w'-]+", text.lower()))
    # "a" and "an" follow the next word, which in the two sentiments may begin with a vowel.
    for counter in counts:
        counter["a"] += counter.pop("an", 0)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("task", GLUE)
def test_no_row_twice_and_none_in_two_splits(task: str) -> None:
    everything = [pair for name, split in SPLITS if name == task for pair in pairs(made(task, split))]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize(("task", "split"), [item for item in SPLITS if item[1] != "train"])
def test_dev_has_content_words_of_its_own(task: str, split: str) -> None:
    train, dev = vocabulary(made(task, "train")), vocabulary(made(task, split))
    assert train & dev <= CLOSED
    assert len(dev - train) >= 40


def test_dev_has_templates_of_its_own() -> None:
    """Every table that is kept by split has nothing in common between train and the dev splits."""

    def leaves(value: object) -> set[str]:
        if isinstance(value, str):
            return {value}
        if isinstance(value, Scheme):
            return {value.left, value.right}
        assert isinstance(value, tuple | dict), value
        items = value.values() if isinstance(value, dict) else value
        return set().union(*(leaves(item) for item in items))

    tables = 0
    for module in (acceptability, answers, inference, paraphrase, pronouns, sentiment):
        for name, table in vars(module).items():
            if isinstance(table, dict) and "train" in table and name not in ("LEXICON", "SYNONYMS"):
                if name == "_AUXILIARIES":  # is/are: a choice of the grammar
                    continue
                tables += 1
                for split in set(table) - {"train"}:
                    assert leaves(table["train"]).isdisjoint(leaves(table[split]) - {"who", "when", "where", "why"}), (
                        name
                    )
    assert tables >= 20


def scores(predicted: np.ndarray, gold: np.ndarray, task: str) -> float:
    if GLUE[task].regression:
        return 0.0 if np.ptp(predicted) < 1e-9 else float(pearsonr(predicted, gold)[0])
    return float((matthews_corrcoef if task == "cola" else accuracy_score)(gold, predicted))


def baseline(task: str, train: csr_matrix | np.ndarray, dev: csr_matrix | np.ndarray) -> float:
    gold, held = (np.array(made(task, split).labels) for split in ("train", "dev"))
    model = Ridge(alpha=1.0) if GLUE[task].regression else LogisticRegression(max_iter=200)
    return scores(model.fit(train, gold).predict(dev), held, task)


def chance(task: str) -> float:
    return 0.0 if task in ("cola", "stsb") else 1.0 / GLUE[task].num_labels


def bags(task: str, fields: tuple[str, ...]) -> tuple[csr_matrix, csr_matrix]:
    data = [made(task, split) for split in ("train", "dev")]
    columns: tuple[list[csr_matrix], list[csr_matrix]] = ([], [])
    for field in fields:
        words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
        columns[0].append(words.fit_transform(getattr(data[0], field)))
        columns[1].append(words.transform(getattr(data[1], field)))
    return hstack(columns[0]).tocsr(), hstack(columns[1]).tocsr()


@pytest.mark.parametrize("task", GLUE)
def test_a_bag_of_words_learns_nothing(task: str) -> None:
    fields = ("text_a", "text_b") if task in PAIRS else ("text_a",)
    allowed = {"cola": 0.12, "stsb": 0.25}.get(task, 0.05)
    assert abs(baseline(task, *bags(task, fields)) - chance(task)) <= allowed


@pytest.mark.parametrize("task", PAIRS)
@pytest.mark.parametrize("field", ["text_a", "text_b"])
def test_one_sentence_of_a_pair_tells_nothing(task: str, field: str) -> None:
    assert abs(baseline(task, *bags(task, (field,))) - chance(task)) <= (0.25 if task == "stsb" else 0.05)


def overlap(split: Split) -> np.ndarray:
    """Common words, their share of all words, and the difference in length, signed and not."""
    features = []
    for a, b in pairs(split):
        first, second = (re.findall(r"\w+", text.lower()) for text in (a, b))
        common, either = set(first) & set(second), set(first) | set(second)
        longer = len(first) - len(second)
        features.append((len(common), len(common) / len(either), longer, abs(longer)))
    return np.array(features, dtype=float)


@pytest.mark.parametrize("task", PAIRS)
def test_common_words_and_lengths_do_not_solve_a_pair_task(task: str) -> None:
    train, dev = (overlap(made(task, split)) for split in ("train", "dev"))
    assert baseline(task, train, dev) - chance(task) <= (0.5 if task == "stsb" else 0.12)


def test_relations_between_claims() -> None:
    space = Space(2, 2)
    rain, both = space.fact("it rains", 0, 1), Claim("it rains and blows", frozenset({(1, 1)}))
    dry, calm = space.none("neither", (0, 1)), space.fact("no wind", 1, 0)
    assert inference_of(both, rain) == "entailment"
    assert inference_of(rain, both) == "neutral"
    assert inference_of(rain, calm) == "neutral"
    assert inference_of(rain, dry) == "contradiction"
    assert inference_of(dry, calm) == "entailment"
    assert space.some("either", (0, 1)).worlds == {(0, 1), (1, 0), (1, 1)}


def test_hypernyms_entail_upwards_only() -> None:
    """Read back from the text, apart from the generator's own notion of a world."""
    kind_of = {member: hypernym for hypernym, members in LEXICON["train"].kinds for member in members}
    frame = "(?:Yesterday |The radio said that |It is clear that |This means that )?"
    simple = re.compile(frame + r"([A-Z]\w+) (\w+) an? ([\w-]+?)(?: this morning)?\.")
    found: Counter[int] = Counter()
    for row in rows("mnli", "train"):
        claims = [simple.fullmatch(text) for text in (row.text_a, row.text_b or "")]
        if row.family == "kinds" and all(claims):
            (who, did, one), (whom, done, two) = (claim.groups() for claim in claims if claim)
            assert who == whom
            up = did == done and two in (one, kind_of.get(one))
            assert row.label == (0 if up else 1), row
            found[int(row.label)] += 1
    assert min(found[0], found[1]) >= 5


def test_a_latin_design_needs_a_partner_for_everyone() -> None:
    space = Space(2)
    claims = [space.fact("yes", 0, 1), space.fact("no", 0, 0)]
    again = [Claim(claim.text + "!", claim.worlds) for claim in claims]
    same = latin(claims, again, lambda a, b: int(a.worlds == b.worlds), 2, Random(0))
    assert sorted(same) == [("no", "no!", 1), ("no", "yes!", 0), ("yes", "no!", 0), ("yes", "yes!", 1)]
    assert latin(claims, again, lambda a, b: 0, 2, Random(0)) == []


@pytest.mark.parametrize(
    ("template", "slots", "expected"),
    [
        ("{x:s} and {y:s}", {"x": "city", "y": "fisherman"}, "cities and fishermen"),
        ("{x:s}", {"x": "police officer"}, "police officers"),
        ("{v:ed} {w:ed} {u:ed}", {"v": "grab", "w": "buy", "u": "carry"}, "grabbed bought carried"),
        ("{v:en} {w:en}", {"v": "steal", "w": "hand over"}, "stolen handed over"),
        ("{v:ing} {w:ing}", {"v": "take part", "w": "swim"}, "taking part swimming"),
        (
            "a {x}, a {y} and a {z}",
            {"x": "owl", "y": "unicorn", "z": "honest man"},
            "an owl, a unicorn and an honest man",
        ),
    ],
)
def test_inflection(template: str, slots: dict[str, str], expected: str) -> None:
    assert fill(template, **slots) == expected


def test_an_unknown_task_or_split_is_named_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"no task 'snli'.*mnli"):
        generate("snli", "train")
    with pytest.raises(DataError, match=r"rte has no split 'dev_mismatched'.*train, dev"):
        generate("rte", "dev_mismatched")
