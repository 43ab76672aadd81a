"""A recipe is read strictly, checked completely, and written back so that it reads the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from guardtrain.config import DataConfig, ModelConfig, OutputConfig, Recipe, Source, TaskConfig, TrainConfig
from guardtrain.errors import ConfigError
from guardtrain.overrides import apply_override, build_recipe, dump_recipe, find_recipe, load_recipe, parse_yaml, recipe_to_tree


def build(text: str = "", *overrides: str) -> Recipe:
    return build_recipe(parse_yaml(text, "my.yaml"), overrides, name="my", where="my.yaml")


def refuse(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(text, *overrides)
    return str(caught.value)


# --- strict YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("010", 10),
        ("08", 8),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'08'", "08"),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    got = parse_yaml(f"key: {text}\n", "my.yaml")["key"]
    assert got == value
    assert type(got) is type(value)


def test_an_empty_file_is_a_recipe_of_defaults() -> None:
    assert build("") == Recipe(name="my")
    assert build("# only a comment\ntrain:\n  # epochs: 3\nmodel:\n") == Recipe(name="my")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("train:\n  epochs: 1\n  epochs: 2\n", 3, "'epochs' is given twice"),
        ("train: {}\ndata: {}\ntrain: {}\n", 3, "'train' is given twice"),
        ("data:\n  train:\n    - path: a\n      path: b\n", 4, "'path' is given twice"),
        ("train:\n  epochs: [1\n", 3, "not valid YAML"),
        ("train:\n\tepochs: 1\n", 2, "not valid YAML"),
        ("train: {}\n---\ndata: {}\n", 2, "not valid YAML"),
        ("train: !!python/name:os.system\n", 1, "not valid YAML"),
        ("name: {{ recipe }}\n", 1, "not a key"),
        ("name: a\nmodel: b\x07\n", 2, "not valid YAML"),
        ("- train\n", 1, "a mapping of sections"),
        ("just words\n", 1, "a mapping of sections"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(text: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml:{line}: ")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"my.yaml.*UTF-8"):
        load_recipe(str(path))


# --- unknown keys and wrong values, all at once


def test_unknown_sections_and_keys_name_the_nearest_valid_one() -> None:
    line = refuse("trian: {}\ntrain:\n  learning_rte: 1e-4\nmodel:\n  zzz: 1\ndata:\n  train:\n    - pth: a\n")
    assert "trian: unknown section, did you mean train?" in line
    assert "train.learning_rte: unknown key, did you mean train.learning_rate?" in line
    assert "model.zzz: unknown key, expected one of attention, dtype, lora_alpha" in line
    assert "data.train.0.pth" in line


def test_keys_that_are_no_words_are_unknown_keys() -> None:
    line = refuse("1: 2\nnull: 3\ntrain:\n  5: 6\n")
    assert "1: unknown section" in line
    assert "train.5: unknown key" in line


def test_every_problem_is_in_one_error() -> None:
    line = refuse(
        "train:\n  epochs: 0\n  pack_tokens: 10\n  weight_decay: nan\ntask:\n  modes: [off, off]\nmodel: {lora_rank: 0}\nfoo: 1\n"
    )
    for key in ("train.epochs", "train.pack_tokens", "train.weight_decay", "task.modes", "model.lora_rank", "foo"):
        assert f"{key}: " in line, key
    assert line.startswith("my.yaml: ")


def test_every_wrong_type_is_in_one_error_beside_unknown_keys() -> None:
    line = refuse("train:\n  epochs: many\n  save_steps: [1]\nmodel:\n  method: loar\nfoo: 1\n")
    for part in ("train.epochs: ", "found 'many'", "train.save_steps: ", "model.method: ", "'loar'", "foo: unknown section"):
        assert part in line, part


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.learning_rate=0", "train.learning_rate"),
        ("train.learning_rate=nan", "train.learning_rate"),
        ("train.max_grad_norm=nan", "train.max_grad_norm"),
        ("train.max_grad_norm=0", "train.max_grad_norm"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.warmup_ratio=1", "train.warmup_ratio"),
        ("train.max_steps=0", "train.max_steps"),
        ("train.watch_rows=1", "train.watch_rows"),
        ("model.lora_dropout=1", "model.lora_dropout"),
        ("model.trained_layers=0", "model.trained_layers"),
        ("data.train=[]", "data.train"),
        ("data.train=[{path: a, weight: 0}]", "weight"),
        ("data.validation_fraction=1", "data.validation_fraction"),
        ("data.max_rows=1", "data.max_rows"),
        ("task.policy=' '", "task.policy"),
        ("task.verdict_weight=0", "task.verdict_weight"),
        ("task.on_share=0", "task.on_share"),
        ("task.on_share=1.5", "task.on_share"),
        ("task.modes=[]", "task.modes"),
        ("evaluate.modes=[off, off]", "evaluate.modes"),
        ("evaluate.target_fpr=0", "evaluate.target_fpr"),
        ("output.dir=' '", "output.dir"),
        ("output.dir='runs/{nmae}'", "output.dir"),
        ("output.dir='runs/{'", "output.dir"),
        ("output.keep_checkpoints=1", "output.keep_checkpoints"),
        ("output.mirror='bucket/{nmae}'", "output.mirror"),
    ],
)
def test_impossible_values_are_refused(override: str, key: str) -> None:
    assert key in refuse("", override)


def test_a_share_of_reasons_needs_mode_off() -> None:
    tree = parse_yaml("task: {modes: [on], on_share: 0.5}", "here")
    with pytest.raises(ConfigError, match=r"task\.on_share: needs mode off"):
        build_recipe(tree, [], name="x", where="here")


# --- overrides and shorthand


def test_overrides_win_over_the_file() -> None:
    recipe = build(
        "train:\n  epochs: 5\n  save_steps: 7\n",
        "train.epochs=2.5",
        "train.learning_rate=2e-4",
        "task.modes=[off]",
        "train.report_to=[trackio, wandb]",
        "train.max_steps=null",
        "model.revision='08'",
        "data.train=[{path: rows.jsonl, weight: 2, columns: {prompt: instruction}}, starter]",
    )
    assert recipe.train == TrainConfig(epochs=2.5, save_steps=7, learning_rate=2e-4, report_to=("trackio", "wandb"))
    assert recipe.task.modes == ("off",)
    assert recipe.model.revision == "08"
    assert recipe.data.train == (Source(path="rows.jsonl", weight=2, columns={"prompt": "instruction"}), Source(path="starter"))


def test_an_override_may_hold_an_equals_sign() -> None:
    assert build("", "task.policy=a=b").task.policy == "a=b"


def test_a_bare_word_stands_for_the_main_key() -> None:
    recipe = build("model: my/model\ntask: instruct\noutput: out\ndata:\n  train: rows.jsonl\n")
    assert recipe.model == ModelConfig(name="my/model")
    assert recipe.task == TaskConfig(kind="instruct")
    assert recipe.output == OutputConfig(dir="out")
    assert recipe.data.train == (Source(path="rows.jsonl"),)
    assert build("", "data.validation=dev.jsonl").data.validation == (Source(path="dev.jsonl"),)


def test_a_bare_override_keeps_the_rest_of_its_section() -> None:
    recipe = build("model:\n  name: a\n  method: lora\n  lora_rank: 4\n", "model=b")
    assert recipe.model == ModelConfig(name="b", method="lora", lora_rank=4)
    assert build("model: a\n", "model.method=lora").model == ModelConfig(name="a", method="lora")
    assert build("train:\n", "train.epochs=1").train == TrainConfig(epochs=1)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.epochs", "section.key=value"),
        ("=3", "section.key=value"),
        ("train..epochs=3", "section.key=value"),
        ("train.epochs=[1", "train.epochs: the value is not valid YAML"),
        ("name.first.second=3", "not a section"),
        ("train.epochs=1=2", "train.epochs"),
        ("train.epoch=3", "did you mean train.epochs?"),
    ],
)
def test_broken_overrides_are_refused(override: str, what: str) -> None:
    assert what in refuse("name: a\n", override)


def test_building_changes_no_input() -> None:
    tree = {"train": {"epochs": 1}, "data": {"train": ["a"]}}
    build_recipe(tree, ["train.epochs=2", "data.seed=1"], name="my", where="my.yaml")
    assert tree == {"train": {"epochs": 1}, "data": {"train": ["a"]}}
    apply_override(tree, "train.seed=3")
    assert tree["train"] == {"epochs": 1, "seed": 3}


# --- finding a recipe


def test_a_shipped_recipe_by_name_and_a_file_by_path(tmp_path: Path) -> None:
    assert load_recipe("quickstart").name == "quickstart"
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  epochs: 1\n")
    recipe = load_recipe(str(path), ["output.dir=out/{recipe}"])
    assert (recipe.name, recipe.run_dir) == ("mine", "out/mine")
    path.write_text("name: other\n")
    assert load_recipe(str(path)).run_dir == "runs/other"


def test_every_shipped_recipe_is_valid() -> None:
    folder = find_recipe("quickstart").parent
    names = [path.stem for path in folder.glob("*.yaml")]
    assert [load_recipe(name).name for name in names] == names


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        find_recipe("quikstart")
    with pytest.raises(ConfigError, match="no such recipe file"):
        find_recipe("quickstart.yaml")


# --- round trip

awkward = st.sampled_from(
    ["off", "on", "08", "010", "12e5", "1e10", "2e-4", "null", "~", "TRUE", "1_000", "0x1f", "", "=", "<<", "- a", "a: b"]
)
words = st.one_of(awkward, st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
numbers = st.floats(min_value=1e-12, max_value=0.99)

recipes = st.builds(
    Recipe,
    name=words,
    model=st.builds(
        ModelConfig,
        name=words,
        revision=st.none() | words,
        lora_dropout=numbers,
        lora_rank=st.integers(1, 10**6),
        lora_targets=st.lists(words, max_size=3).map(tuple),
    ),
    data=st.builds(
        DataConfig,
        train=st.lists(
            st.builds(
                Source, path=words, weight=numbers, reasons=st.none() | words, columns=st.dictionaries(words, words, max_size=2)
            ),
            min_size=1,
            max_size=2,
        ).map(tuple),
        seed=st.integers(-(10**12), 10**12),
    ),
    task=st.builds(
        TaskConfig, policy=words.filter(str.strip), verdict_weight=numbers, modes=st.sampled_from([("off",), ("on", "off")])
    ),
    train=st.builds(
        TrainConfig, learning_rate=numbers, max_steps=st.none() | st.integers(1, 9), gradient_checkpointing=st.booleans()
    ),
)


@given(recipe=recipes)
def test_what_is_dumped_loads_back_equal(recipe: Recipe) -> None:
    text = dump_recipe(recipe)
    loaded = build_recipe(parse_yaml(text, "dumped"), [], name="unused", where="dumped")
    assert loaded == recipe
    assert recipe_to_tree(loaded) == recipe_to_tree(recipe)


@given(recipe=recipes)
def test_other_yaml_readers_read_the_same_texts(recipe: Recipe) -> None:
    tree = yaml.safe_load(dump_recipe(recipe))
    assert tree["model"]["revision"] == recipe.model.revision
    assert tree["task"]["policy"] == recipe.task.policy
    assert tree["task"]["modes"] == list(recipe.task.modes)
    assert math.isclose(tree["train"]["learning_rate"], recipe.train.learning_rate)


def test_a_dump_states_every_default() -> None:
    tree = yaml.safe_load(dump_recipe(Recipe()))
    assert tree == recipe_to_tree(Recipe())
    assert tree["train"]["learning_rate"] == TrainConfig().learning_rate
    (source,) = tree["data"]["train"]
    assert set(source) == {field.name for field in dataclasses.fields(Source)}
    assert (source["path"], source["weight"], source["reasons"]) == ("starter", 1.0, None)


@pytest.mark.parametrize("break_", ["\x85", "\u2028", "\u2029", "\n", "\r", "\t"])
def test_line_breaks_of_every_kind_survive_a_dump(break_: str) -> None:
    recipe = Recipe(task=TaskConfig(policy=f"first{break_}second 日本"))
    assert build_recipe(parse_yaml(dump_recipe(recipe), "dump"), [], name="recipe", where="dump") == recipe
