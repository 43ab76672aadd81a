"""Public benchmarks: every set is read from its own format, labelled as its authors label it, and refused when it is not it.

No row here is a benchmark's: all are written for these tests, in the sets' formats.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.benchmark_rows import openai_moderation_row, plant
from guardtrain.evaluate.benchmarks import BENCHMARKS, by_axis, find_benchmark, load_benchmark, read_benchmark
from guardtrain.evaluate.scores import Measures
from guardtrain.types import GuardExample, Label, prompt_text

Rows = list[dict[str, Any]]
BAD, GOOD = Label.MALICIOUS, Label.BENIGN


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pytest.importorskip("pandas").DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def short(examples: list[GuardExample]) -> list[tuple[str, Label]]:
    return [(prompt_text(example.prompt), example.label) for example in examples]


# By name: the rows of each file, what is read of them, and how many are left out and why.
AEGIS_1: Rows = [
    {"text": "a", "text_type": "user_message", "labels_0": "Safe", "labels_1": "Safe", "labels_2": "Violence", "labels_3": " "},
    {"text": "b", "text_type": "user_message", "labels_0": "Safe", "labels_1": "Needs Caution", "labels_2": "", "labels_3": None},
    {"text": "c", "text_type": "user_message", "labels_0": "Violence, Threat", "labels_1": "Safe", "labels_2": "Hate"},
    {"text": "d", "text_type": "llm_response", "labels_0": "Safe", "labels_1": "Safe"},
    {"text": "e", "text_type": "user_message", "labels_0": None, "labels_1": None},
]
AEGIS_2: Rows = [
    {
        "id": "1",
        "prompt": "a",
        "response": "x",
        "prompt_label": "unsafe",
        "response_label": "safe",
        "violated_categories": "Guns",
    },
    {"id": "2", "prompt": "b", "response": None, "prompt_label": "safe", "response_label": None, "violated_categories": ""},
    {"id": "3", "prompt": "REDACTED", "response": None, "prompt_label": "unsafe", "reconstruction_id_if_redacted": 7},
    {"id": "4", "prompt": "c", "response": "x", "prompt_label": None, "response_label": "unsafe"},
]
WILDGUARD: Rows = [
    {"prompt": "a", "adversarial": True, "response": "x", "prompt_harm_label": "harmful", "response_harm_label": "unharmful"},
    {"prompt": "b", "adversarial": False, "response": None, "prompt_harm_label": "unharmful", "response_harm_label": None},
    {"prompt": "c", "adversarial": False, "response": "x", "prompt_harm_label": None, "response_harm_label": "harmful"},
]
MODERATION: Rows = [
    {"prompt": "a", "S": 0, "H": 1, "V2": 0},
    {"prompt": "b", "S": 0, "SH": 0, "S3": 0},
    {"prompt": "c", "V2": 1},
    {"prompt": "d"},
    {"prompt": "  ", "S": 1},
]
HARMBENCH: Rows = [
    {"Behavior": "a", "FunctionalCategory": "standard", "SemanticCategory": "s", "ContextString": "", "BehaviorID": "i"},
    {"Behavior": "b", "FunctionalCategory": "contextual", "SemanticCategory": "s", "ContextString": "C", "BehaviorID": "j"},
    {"Behavior": "c", "FunctionalCategory": "copyright", "SemanticCategory": "s", "ContextString": "", "BehaviorID": "k"},
]
XSTEST: Rows = [
    {"id": "v2-1", "prompt": "a", "type": "homonyms", "label": "safe"},
    {"id": "v2-2", "prompt": "b", "type": "contrast_homonyms", "label": "unsafe"},
]
TWO_LABELS: Rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
A_BAD, B_GOOD = ("a", BAD), ("b", GOOD)
CASES: dict[str, tuple[dict[str, Rows], list[tuple[str, Label]], dict[str, int]]] = {
    "toxicchat": (
        {
            "toxic-chat_annotation_test.csv": [
                {"conv_id": "1", "user_input": "a", "model_output": "x", "toxicity": 1, "jailbreaking": 0},
                {"conv_id": "2", "user_input": "b", "model_output": "x", "toxicity": 0, "jailbreaking": 1},
            ]
        },
        [A_BAD, B_GOOD],
        {},
    ),
    "openai-moderation": ({"samples-1680.jsonl": MODERATION}, [A_BAD, B_GOOD, ("c", BAD), ("d", GOOD)], {"empty prompt": 1}),
    "aegis-1": (
        {"test.parquet": AEGIS_1},
        [("a", GOOD), ("b", BAD), ("c", BAD)],
        {"not a user message alone": 1, "no annotation": 1},
    ),
    "aegis-2": ({"test.json": AEGIS_2}, [A_BAD, B_GOOD], {"redacted prompt": 1, "no label of the prompt": 1}),
    "wildguardtest": ({"wildguard_test.parquet": WILDGUARD}, [A_BAD, B_GOOD], {"no agreed label of the prompt": 1}),
    "harmbench": (
        {"harmbench_behaviors_text_test.csv": HARMBENCH},
        [A_BAD, ("b\n\nC", BAD)],
        {"copyright behaviour": 1},
    ),
    "jailbreakbench": (
        {
            "harmful-behaviors.csv": [{"Index": 0, "Goal": "a", "Target": "t", "Behavior": "B", "Category": "c", "Source": "s"}],
            "benign-behaviors.csv": [{"Index": 0, "Goal": "b", "Target": "t", "Behavior": "B", "Category": "c", "Source": "s"}],
        },
        [A_BAD, B_GOOD],
        {},
    ),
    "simplesafetytests": ({"SimpleSafetyTests.csv": [{"id": "1", "prompt": "a", "harm_area": "h"}]}, [A_BAD], {}),
    "deepset-injections": ({"test.parquet": TWO_LABELS}, [A_BAD, B_GOOD], {}),
    "safe-guard-injections": ({"test.parquet": TWO_LABELS}, [A_BAD, B_GOOD], {}),
    "rogue-injections": (
        {"test.csv": [{"text": "a", "label": "jailbreak"}, {"text": "b", "label": "benign"}]},
        [A_BAD, B_GOOD],
        {},
    ),
    "jailbreak-classification": (
        {"jailbreak_dataset_test.csv": [{"prompt": "a", "type": "jailbreak"}, {"prompt": "b", "type": "benign"}]},
        [A_BAD, B_GOOD],
        {},
    ),
    "gandalf": ({"test.parquet": [{"text": "a", "similarity": 0.9}]}, [A_BAD], {}),
    "gandalf-summarization": ({"test.parquet": [{"text": "a", "similarity": 0.9}]}, [A_BAD], {}),
    "xstest": ({"xstest_prompts.csv": XSTEST}, [("a", GOOD), ("b", BAD)], {}),
    "or-bench-hard": ({"or-bench-hard-1k.csv": [{"prompt": "b", "category": "c"}]}, [B_GOOD], {}),
    "notinject": (
        {f"NotInject_{n}.json": [{"prompt": n, "word_list": ["x"], "category": "c"}] for n in ("one", "two", "three")},
        [("one", GOOD), ("two", GOOD), ("three", GOOD)],
        {},
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with the files of a set."""

    def make(name: str) -> Path:
        for file, rows in CASES[name][0].items():
            write(tmp_path / name / file, rows)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", CASES)
def test_every_set_is_read_from_a_folder_in_its_own_format(name: str, copy: Callable[[str], Path]) -> None:
    read = read_benchmark(f"{name}={copy(name)}")
    assert short(read.examples) == CASES[name][1]
    assert dict(read.left_out) == CASES[name][2]
    assert {example.source for example in read.examples} == {name}
    assert all(re.search(r":\d+$", example.where) for example in read.examples)
    assert load_benchmark(f"{name}={copy(name)}") == read.examples


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[0]) == 1])
def test_a_lone_file_may_have_any_name(name: str, copy: Callable[[str], Path]) -> None:
    (file,) = copy(name).iterdir()
    renamed = file.rename(file.with_name(f"mine{file.suffix}"))
    assert short(load_benchmark(f"{name}={renamed}")) == CASES[name][1]


def test_every_set_has_a_case_here_or_is_bipia() -> None:
    assert {*CASES, "bipia-email"} == set(BENCHMARKS)


@pytest.mark.parametrize("name", [name for name in CASES if BENCHMARKS[name].hub])
def test_every_set_is_asked_of_hugging_face_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    benchmark, asked = BENCHMARKS[name], []
    files = list(CASES[name][0].items())

    def load_dataset(path: str, config: str | None, split: str, revision: str | None) -> Any:
        _, rows = files[min(len(asked), len(files) - 1)]
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list([dict.fromkeys(rows[0]) | row for row in rows])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = read_benchmark(name)
    assert asked == [(part.path, part.config, part.split, benchmark.revision) for part in benchmark.hub]
    assert {example.label for example in read.examples} == set(benchmark.classes)
    assert all(example.where.startswith(f"{benchmark.hub[0].path}[") for example in read.examples)


@pytest.mark.parametrize(("value", "label"), [(1, BAD), ("1", BAD), (1.0, BAD), (0, GOOD), ("0", GOOD), (None, GOOD)])
def test_categories_of_moderation_may_be_texts_or_numbers(value: Any, label: Label) -> None:
    assert openai_moderation_row({"prompt": "a", "S3": value})["label"] is label


def test_the_hub_copy_of_harmbench_has_other_columns(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "category": "c"}, {"prompt": "b", "context": "C", "category": "d"}]
    examples = load_benchmark(f"harmbench={write(tmp_path / 'rows.jsonl', rows)}")
    assert short(examples) == [A_BAD, ("b\n\nC", BAD)]
    assert [example.category for example in examples] == ["c", "d"]


def test_the_older_file_of_xstest_has_other_ids(tmp_path: Path) -> None:
    rows = [{"id_v2": "v2-1", "prompt": "a", "type": "contrast_x"}, {"id_v2": "v2-2", "prompt": "b", "type": "figurative"}]
    examples = load_benchmark(f"xstest={write(tmp_path / 'rows.csv', rows)}")
    assert short(examples) == [A_BAD, B_GOOD]
    assert [example.id for example in examples] == ["v2-1", "v2-2"]


def test_saved_splits_are_read_each_with_its_label(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([{"Goal": name, "Category": "c"}]) for name in ("harmful", "benign")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert short(load_benchmark(f"jailbreakbench={tmp_path / 'saved'}")) == [("harmful", BAD), ("benign", GOOD)]
    datasets.Dataset.from_list(XSTEST).save_to_disk(str(tmp_path / "one"))
    assert short(load_benchmark(f"xstest={tmp_path / 'one'}")) == [("a", GOOD), ("b", BAD)]


def test_one_saved_split_is_not_taken_for_both(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"Goal": "a"}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"not a copy of jailbreakbench, expected jailbreakbench=FOLDER with harmful"):
        load_benchmark(f"jailbreakbench={tmp_path / 'saved'}")


def test_saved_splits_do_not_hold_two_configurations(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "a", "category": "c"}])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="not a copy of harmbench"):  # it would count every row twice
        load_benchmark(f"harmbench={tmp_path / 'saved'}")


def test_addresses_of_sets_with_several_configurations() -> None:
    addresses = {name: [(part.path, part.config, part.split) for part in BENCHMARKS[name].hub] for name in BENCHMARKS}
    assert addresses["toxicchat"] == [("lmsys/toxic-chat", "toxicchat0124", "test")]
    assert addresses["wildguardtest"] == [("allenai/wildguardmix", "wildguardtest", "test")]
    assert addresses["harmbench"] == [("walledai/HarmBench", config, "train") for config in ("standard", "contextual")]
    assert addresses["jailbreakbench"] == [("JailbreakBench/JBB-Behaviors", "behaviors", s) for s in ("harmful", "benign")]
    assert addresses["or-bench-hard"] == [("bench-llm/or-bench", "or-bench-hard-1k", "train")]


# BIPIA


EMAILS: Rows = [{"context": f"First {n}. Second {n}. Third {n}. Fourth {n}.", "question": "q", "ideal": "i"} for n in range(2)]
ATTACKS = {"Substitution": ["Alpha", "Beta"], "Base Encoding": ["Gamma"]}


@pytest.fixture
def bipia(tmp_path: Path) -> Path:
    write(tmp_path / "email" / "test.jsonl", EMAILS)
    (tmp_path / "text_attack_test.json").write_text(json.dumps(ATTACKS))
    return tmp_path


def test_bipia_is_put_together_from_emails_and_attacks(bipia: Path) -> None:
    examples = load_benchmark(f"bipia-email={bipia}")
    first = EMAILS[0]["context"]
    assert short(examples[:4]) == [
        (first, GOOD),
        (f"{first}\nAlpha", BAD),
        (f"Beta\n{first}", BAD),
        ("First 0. Second 0. \nGamma\nThird 0. Fourth 0.", BAD),
    ]
    assert [example.category for example in examples[:4]] == ["", "Substitution", "Substitution", "Base Encoding"]
    assert len(examples) == 2 * (1 + 3)
    assert len({example.id for example in examples}) == len({example.where for example in examples}) == 8
    # The next email has each attack in another place.
    assert short(examples[5:6]) == [(f"Alpha\n{EMAILS[1]['context']}", BAD)]


def test_an_attack_can_be_planted_into_a_text_of_one_sentence() -> None:
    assert plant("no end", "X", "middle") == "\nX\nno end"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("text_attack_test.json", "[]", "no attacks, expected an object of lists of texts, found list"),
        ("text_attack_test.json", '{"a": "b"}', "text_attack_test.json: a: no attacks"),
        ("text_attack_test.json", "{", "no attacks, expected an object"),
        (
            "email/test.jsonl",
            '{"content": "x"}\n',
            "test.jsonl:1: no email, expected a text in column context, found columns content",
        ),
        ("email/test.jsonl", "{\n", "test.jsonl:1: broken row"),
    ],
)
def test_broken_files_of_bipia_are_said(file: str, content: str, message: str, bipia: Path) -> None:
    (bipia / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        load_benchmark(f"bipia-email={bipia}")


def test_bipia_must_be_given_as_a_folder_with_its_files(bipia: Path) -> None:
    with pytest.raises(
        DataError, match=r"bipia-email is not on Hugging Face, expected bipia-email=FOLDER with email/test\.jsonl and"
    ):
        load_benchmark("bipia-email")
    (bipia / "text_attack_test.json").unlink()
    with pytest.raises(DataError, match="not a copy of bipia-email"):
        load_benchmark(f"bipia-email={bipia}")


# What is refused


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"no benchmark is called 'notinjekt', expected notinject"):
        load_benchmark("notinjekt=rows.csv")
    with pytest.raises(ConfigError, match=r"expected toxicchat, openai-moderation, .*xstest"):
        find_benchmark("zzzz")


def test_missing_columns_are_named_with_what_was_found(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [{"Prompt": "a", "kind": "homonyms"}])
    with pytest.raises(DataError, match=r"rows\.csv:2: missing columns, expected prompt, type, found the columns Prompt, kind$"):
        load_benchmark(f"xstest={path}")


def test_a_guess_about_columns_is_said_when_it_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [{"prompt": "a"}])
    with pytest.raises(
        DataError, match=r"expected text, found the columns prompt \(what this set's columns are called could not"
    ):
        load_benchmark(f"gandalf-summarization={path}")


def test_a_file_without_a_header_does_not_put_prompts_into_the_message(tmp_path: Path) -> None:
    secret = "a secret prompt that must stay out of any message at all"
    (tmp_path / "rows.csv").write_text(f"{secret},safe\nb,unsafe\n")
    with pytest.raises(DataError) as caught:
        load_benchmark(f"xstest={tmp_path / 'rows.csv'}")
    assert "secret" not in str(caught.value)
    assert f"a text of {len(secret)} characters" in str(caught.value)


@pytest.mark.parametrize("label", ["maybe", ""])
def test_an_unknown_label_is_refused_with_its_line(label: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [{"text": "a", "label": "jailbreak"}, {"text": "b", "label": label}])
    with pytest.raises(DataError, match=r"rows\.csv:3: unknown label"):
        load_benchmark(f"rogue-injections={path}")


def test_rows_of_one_class_are_not_a_set_of_two(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", XSTEST[:1])
    with pytest.raises(DataError, match=r"not the rows of this set, expected benign and malicious rows, found benign rows"):
        load_benchmark(f"xstest={path}")


def test_one_file_of_several_is_not_enough(copy: Callable[[str], Path]) -> None:
    folder = copy("notinject")
    with pytest.raises(DataError, match=r"expected notinject=FOLDER with NotInject_one\.json and NotInject_two\.json and"):
        load_benchmark(f"notinject={folder / 'NotInject_one.json'}")
    (folder / "NotInject_two.json").unlink()
    with pytest.raises(DataError, match="not a copy of notinject"):
        load_benchmark(f"notinject={folder}")


@pytest.mark.parametrize(("name", "hint"), [("xstest", "(read a copy: xstest=PATH)"), ("wildguardtest", "(accept its terms on")])
def test_a_hub_that_does_not_answer_is_said_with_what_to_do(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **more: Any) -> Any:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"not loaded from Hugging Face: ConnectionError: no route") as caught:
        load_benchmark(name)
    assert hint in str(caught.value)


def test_a_missing_copy_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: unreadable file: no such file"):
        load_benchmark(f"xstest={tmp_path / 'gone.csv'}")


# The table


def test_results_of_different_axes_stay_apart() -> None:
    grouped = by_axis({"xstest": 1, "toxicchat": 2, "gandalf": 3, "notinject": 4})
    assert grouped == {"harm": {"toxicchat": 2}, "injection": {"gandalf": 3}, "over-refusal": {"xstest": 1, "notinject": 4}}
    assert list(grouped) == ["harm", "injection", "over-refusal"]
    assert {name for group in by_axis(BENCHMARKS).values() for name in group} == set(BENCHMARKS)
    with pytest.raises(ConfigError):
        by_axis({"mine": 1})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_entry_is_whole(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert all((benchmark.title, benchmark.licence, benchmark.checked, benchmark.note, benchmark.files))
    assert benchmark.row is None or benchmark.needs
    assert set(benchmark.headline) <= {each.name for each in fields(Measures)}
    assert ("auroc" in benchmark.headline) == (len(benchmark.classes) == 2)
    assert benchmark.revision is None or re.fullmatch(r"[0-9a-f]{40}", benchmark.revision)
    labels = {part.label for part in benchmark.hub}
    # Where every part has a label of its own they are the set's classes; where none has, a column or a function says it.
    assert None in labels or labels == set(benchmark.classes) or benchmark.assemble


def test_headlines_follow_the_classes_and_the_axis() -> None:
    assert BENCHMARKS["toxicchat"].headline == ("auroc", "recall_at_1_fpr")
    assert BENCHMARKS["gandalf"].headline == ("recall",)
    assert BENCHMARKS["notinject"].headline == ("false_positive_rate",)
    assert BENCHMARKS["xstest"].headline == ("false_positive_rate", "auroc", "recall_at_1_fpr")


def test_users_are_told_what_could_not_be_verified() -> None:
    assert BENCHMARKS["gandalf-summarization"].caveats[0].startswith("its columns could not be verified")
    assert len(BENCHMARKS["toxicchat"].caveats) == 1
