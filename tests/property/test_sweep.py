"""A sweep's file gives every combination of its lists once and in order; errors name key and value."""

import dataclasses
import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt import DPT, METHODS, Experiment, TrainingConfig
from softprompt.config import _LATER_FIELDS, _LATER_TRAINING_FIELDS
from softprompt.sweep import Range, Search, expand, read, trial_name
from softprompt.tasks.user import load_task

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
STUDY = sorted((ROOT / "docs/results/study").glob("*.toml"))
DIMS = {"google-t5/t5-small": 512, "google-t5/t5-base": 768, "google-t5/t5-large": 1024, "smollm2-135m": 576}
PUBLISHED = {
    "dpt_superglue_t5_small": {"dpt": {6_120}, "plain": {51_200}, "residual": {462_736}},
    "dpt_superglue_t5_base": {"dpt": {8_680}, "plain": {76_800}, "residual": {693_904}},
    "dpt_superglue_t5_large": {"dpt": {11_240}, "plain": {102_400}, "residual": {925_072}},
    "dept_t5_base": {"dept": {76_800, 79_560}, "plain": {76_800}},
    "adept_t5_base": {"adept": {76_051}, "dept": {76_800}, "plain": {76_800}},
}


def lists(values: st.SearchStrategy[Any], most: int = 2) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=most, unique=True)


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """The tables of a file with lists everywhere, and no experiment in two tables."""
    ranks, lengths = draw(lists(st.integers(1, 5))), draw(lists(st.integers(5, 50)))
    values = {
        "backbone": draw(lists(st.sampled_from(["smollm2-135m", "some/model"]))),
        "seed": draw(lists(st.integers(0, 100), 4)),
        "training": {"lr": draw(lists(st.floats(1e-4, 1.0))), "shots": draw(lists(st.integers(0, 64)))},
        "task": [{"name": draw(lists(st.sampled_from(["cb", "copa:dpt", "rte"])))}],
        "method": [{"name": "dpt", "rank": ranks, "length": lengths}],
    }
    if draw(st.booleans()):
        values["method"].append({"baseline": "lora"})
    return values


@settings(max_examples=25, deadline=None)
@given(files())
def test_expand_gives_the_product_of_the_lists(values: dict[str, Any]) -> None:
    expanded = expand(values, "a file")
    [task], [dpt, *lora], training = values["task"], values["method"], values["training"]
    shared = [values["backbone"], training["lr"], training["shots"]]
    prompts = list(itertools.product(dpt["rank"], dpt["length"]))
    expected = {
        (name, backbone, lr, shots, "dpt", prompt, seed)
        for name, backbone, lr, shots, prompt, seed in itertools.product(task["name"], *shared, prompts, values["seed"])
    }
    expected |= {
        (name, backbone, lr, shots, "lora", None, seed)
        for name, backbone, lr, shots, seed in itertools.product(task["name"], *shared, values["seed"])
        if lora
    }
    assert {settings_of(experiment) for experiment in expanded} == expected
    assert len(expanded) == len(expected)
    assert len({experiment.hash for experiment in expanded}) == len(expanded)
    assert len({trial_name(experiment) for experiment in expanded}) == len(expanded)
    assert expand(values, "a file") == expanded
    runs = [
        list(group) for _, group in itertools.groupby(expanded, key=lambda experiment: experiment.replace(seed=0).hash)
    ]
    assert [[experiment.seed for experiment in run] for run in runs] == [values["seed"]] * len(runs), (
        "the seed varies fastest"
    )


def settings_of(experiment: Experiment) -> tuple[Any, ...]:
    prompt = (getattr(experiment.prompt, "rank"), experiment.prompt.length) if experiment.baseline == "none" else None  # noqa: B009
    return (
        experiment.task,
        experiment.backbone,
        experiment.training.lr,
        experiment.training.shots,
        experiment.method,
        prompt,
        experiment.seed,
    )


@settings(max_examples=10, deadline=None)
@given(files(), st.integers(101, 200))
def test_added_seed_changes_no_other_experiment(values: dict[str, Any], seed: int) -> None:
    more = {**values, "seed": [*values["seed"], seed]}
    assert [experiment for experiment in expand(more, "a file") if experiment.seed != seed] == list(
        expand(values, "a file")
    )


def test_experiment_in_two_tables_is_listed_once() -> None:
    ranks = {"name": "dpt", "rank": [5, 10]}
    lengths = {"name": "dpt", "rank": 10, "length": [50, 20]}
    expanded = expand({"method": [ranks, lengths]}, "a file")
    assert [(experiment.prompt.length, experiment.to_json()["prompt"]["rank"]) for experiment in expanded] == [
        (20, 5),
        (20, 10),
        (50, 10),
    ]


def test_integers_are_accepted_for_floats() -> None:
    [experiment], [integer_lr] = expand({"training": {"lr": 1}}, "a file"), expand({"training": {"lr": 1.0}}, "a file")
    assert experiment.hash == integer_lr.hash


def test_experiment_hash_is_stable() -> None:
    """A new field must not change the hash of finished runs; see `_LATER_FIELDS` in config.py."""
    training = TrainingConfig(shots=8, vocabulary_weight=0.0)
    experiment = Experiment(task="boolq", prompt=DPT(length=100, rank=5), training=training, seed=3)
    assert experiment.hash == "bb918f2e7798e967d16771b39a55547b7b41e1acba37d77d858548b239978bc3"
    assert (
        len(
            {
                experiment.hash,
                experiment.replace(prompt_position="suffix").hash,
                experiment.replace(prompt_attention="self").hash,
            }
        )
        == 3
    )
    for name, value in _LATER_FIELDS.items():
        assert getattr(Experiment(), name) == value
    for name, value in _LATER_TRAINING_FIELDS.items():
        assert getattr(TrainingConfig(), name) == value


def test_empty_file_is_one_default_experiment() -> None:
    assert expand({}, "a file") == (Experiment(),)


def test_method_overrides_task_overrides_file() -> None:
    file = """
        training = { lr = 0.5, steps = 7 }
        prompt = { length = 30 }
        [[task]]
        name = ["cb", "rte"]
        training.steps = 9
        [[method]]
        name = "dept"
        published = true
        only = ["rte"]
        rank = 4
        training.lr = 0.25
        [[method]]
        name = "plain"
        length = 20
    """
    experiment, *plain_experiments = sorted(
        expand(tomllib.loads(file), "a file"), key=lambda experiment: experiment.method
    )
    assert experiment.prompt == METHODS["dept"].published().replace(length=30, rank=4)
    assert (experiment.task, experiment.training.lr, experiment.training.steps) == ("rte", 0.25, 9)
    assert [(two.task, two.method, two.prompt.length, two.training.lr) for two in plain_experiments] == [
        ("cb", "plain", 20, 0.5),
        ("rte", "plain", 20, 0.5),
    ]


REFUSED = [
    ("sede = 1", "FILE has the unknown setting 'sede'; did you mean 'seed'?"),
    ('seed = "one"', "FILE: seed is 'one'; it must be a whole number"),
    ("seed = true", "FILE: seed is True; it must be a whole number"),
    ("seed = []", "FILE: seed is an empty list; give it values, or leave it out"),
    ("seed = [1, 2, 1]", "FILE: seed has 1 twice; give each value once"),
    ('protocol = "both"', "FILE: protocol is 'both'; it must be one of heldout, paper"),
    ('task = "cbb"', "FILE: task is 'cbb': unknown task 'cbb'; did you mean 'cb'?"),
    ('task = "cb"\ndata = "nowhere"', "FILE: data is 'nowhere', but "),
    ("training = 3", "FILE: [training] is 3; it must be a table"),
    ("[training]\nsteps = 1.5", "FILE: [training] steps is 1.5; it must be a whole number"),
    ("[training]\nsteps = 0", "FILE: steps is 0; it must be at least 1"),
    ("[training]\nlr = [0.1, -1]", "FILE: lr is -1.0; it must be a positive number"),
    ("[training]\nstep = 3", "FILE: [training] has the unknown setting 'step'; did you mean 'steps'?"),
    ('method = "dpt"', "FILE: method is 'dpt'; write a table [[method]] for each"),
    ("[[method]]\nrank = 3", "FILE: [[method]] 1 must have either a name"),
    ('[[method]]\nname = "dpd"', "FILE: [[method]] 1 name is 'dpd', which is not a method; did you mean 'dpt'?"),
    ('[[method]]\nname = "dpt"\nranks = 3', "FILE: [[method]] 1 has the unknown setting 'ranks'; did you mean 'rank'?"),
    ('[[method]]\nname = "dpt"\nrank = 3.0', "FILE: [[method]] 1 rank is 3.0; it must be a whole number"),
    ('[[method]]\nname = "dpt"\nrank = [5, 200]', "FILE: [[method]] 1: rank is 200 and length is 20;"),
    ('[[method]]\nname = "dpt"\npublished = 1', "FILE: [[method]] 1 published is 1; it must be true or false"),
    (
        '[[method]]\nbaseline = "lore"',
        "FILE: [[method]] 1 baseline is 'lore'; it must be one of none, lora, full, head",
    ),
    ('[[method]]\nbaseline = "none"', "FILE: [[method]] 1 baseline is 'none'; leave the table out"),
    ('[[method]]\nbaseline = "lora"\nrank = 3', "FILE: [[method]] 1 has the unknown setting 'rank'"),
    ('[[method]]\nname = "dpt"\nonly = ["rte"]', "FILE: [[method]] 1 is only for 'rte', not a task of this file;"),
    ('[prompt]\nrank = 3\n[[method]]\nname = "plain"', "FILE: [prompt] has the unknown setting 'rank';"),
    ("[[task]]\ntraining.steps = 3", 'FILE: [[task]] 1 has no name; add the line name = "cb"'),
    ('[[task]]\nname = "cb"\nseed = 3', "FILE: [[task]] 1 has the unknown setting 'seed'"),
    (
        '[[task]]\nname = "cb"\ntraining.lr = 1\n[[method]]\nname = "dpt"\ntraining.lr = 2',
        "FILE: [[method]] 1 and a [[task]] both set training.lr; leave one out",
    ),
    ("[search]\ntrials = 3", "FILE: [search] has nothing to choose; add [search.space]"),
    ("[search]\ntrial = 3\nspace.training.lr = [1, 2]", "FILE: [search] has the unknown setting 'trial'; did you"),
    ("[search]\ntrials = 0\nspace.training.lr = [1, 2]", "FILE: [search] trials is 0; it must be at least 1"),
    ('[search]\nsampler = "grid"\nspace.training.lr = [1, 2]', "FILE: [search] sampler is 'grid'; it must be one of"),
    ("[search.space]\nlr = [1, 2]", "FILE: [search.space] lr is not a setting of training or of a method in"),
    ('[search.space]\n"prompt.width" = [1, 2]', "FILE: [search.space] prompt.width is not a setting of training or"),
    ("[search.space]\ntraining.lr = 3", "FILE: [search.space] training.lr, which is neither a list nor a range, is 3;"),
    (
        "[search.space]\ntraining.lr = { low = 1 }",
        "FILE: [search.space] training.lr is {'low': 1}; a range has low and",
    ),
    ("[search.space]\ntraining.lr = { low = 0, high = 1 }", "FILE: lr is 0.0; it must be a positive number"),
    (
        "[search.space]\nprompt.rank = { low = 9, high = 2 }",
        "FILE: [search.space] prompt.rank goes from 9 to 2; it must",
    ),
    (
        "[search.space]\nprompt.rank = [1, 200]",
        "FILE: [search] could choose prompt.rank = 200, which is invalid: rank is",
    ),
    (
        "[training]\nlr = [1, 2]\n[search.space]\ntraining.lr = [3, 4]",
        "FILE has a list of training.lr, which [search.space] chooses; leave one out",
    ),
    ("seed = ", "FILE is not TOML: Invalid value (at end of document); correct it there"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_invalid_file_is_refused_by_key_and_value(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(file)
    sentence = str(caught.value)
    assert sentence.startswith(message.replace("FILE", str(file))), sentence
    assert "\n" not in sentence


def test_paths_start_from_the_file_and_data_from_its_flag(ticket_task: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "sweep.toml", tmp_path / "elsewhere"
    (data / "superglue").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    file.write_text('backbone = "tiny"\ntask = "cb"\ndata = "superglue"')
    with pytest.raises(FileNotFoundError, match=r"data is 'superglue', but .*superglue does not exist; see --data"):
        read(file)
    [expanded] = read(file, data).experiments
    assert (expanded.backbone, expanded.data) == (str(tmp_path / "tiny"), str(data / "superglue"))
    file.write_text('task = "cb"')
    with pytest.raises(ValueError, match=r'sets data for no task, so --data .*; add the line data = "\."'):
        read(file, data)
    with pytest.raises(FileNotFoundError, match=r"none\.toml does not exist; give the path of a sweep's \.toml file"):
        read("none.toml")


def test_search_skips_settings_a_method_lacks(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        """
        seed = [1, 2]
        prompt.length = 6
        [[method]]
        name = "dpt"
        [[method]]
        name = "plain"
        [[method]]
        baseline = "lora"
        [search]
        trials = 3
        seed = 7
        space.prompt.rank = { low = 1, high = 6 }
        """
    )
    plan = read(file)
    assert plan.search == Search(trials=3, seed=7, space={"prompt.rank": Range(low=1, high=6, integer=True)})
    assert plan.search.space == {"prompt.rank": Range(low=1, high=6, integer=True)}
    cells = [plan.search.cell(experiment) for experiment in plan.experiments]
    assert [cell and (cell.method, cell.seed) for cell in cells] == [("dpt", 7), ("dpt", 7), None, None, None, None]
    assert cells[0] == cells[1]
    cell = cells[0]
    assert cell is not None
    names = {plan.search.study(cell)}
    assert dataclasses.replace(plan.search, trials=9).study(cell) in names, "more trials are the same study"
    for change in (
        {"seed": 8},
        {"warmup": 2},
        {"prune": False},
        {"sampler": "random"},
        {"space": {"training.lr": (1,)}},
    ):
        names.add(dataclasses.replace(plan.search, **change).study(cell))  # type: ignore[arg-type]
    assert len(names) == 6
    plain = next(experiment for experiment in plan.experiments if experiment.method == "plain")
    rates = Search(space={"training.lr": (0.1, 0.2)})
    both = Search(space={"training.lr": (0.1, 0.2), "prompt.rank": (1, 2)})
    assert rates.study(plain) == both.study(plain), "a plain prompt has no rank to choose"
    assert rates.study(cell) != both.study(cell)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_is_valid_and_has_the_published_sizes(file: Path) -> None:
    plan = read(file)
    assert len(plan.experiments) > 10
    counts: dict[str, set[int]] = {}
    for experiment in plan.experiments:
        assert load_task(experiment.task).templates
        assert not Path(experiment.backbone).is_absolute()
        if experiment.baseline == "none":
            counts.setdefault(experiment.method, set()).add(experiment.prompt.count(DIMS[experiment.backbone]))
    for method, published in PUBLISHED.get(file.stem, {}).items():
        assert counts[method] == published, method
    head = file.read_text().partition("\n\n")[0]
    for word in ("Reproduces: ", "Protocol: ", "Needs: ", f"Run: softprompt sweep recipes/{file.name} --out "):
        assert word in head


def test_every_published_table_has_a_recipe() -> None:
    assert set(PUBLISHED) <= {file.stem for file in RECIPES}
    assert {"dpt_few_shot_t5_base", "dpt_rank_t5_base", "dpt_length_t5_base", "residual_superglue_t5_base"} <= {
        file.stem for file in RECIPES
    }


@pytest.mark.parametrize("file", STUDY, ids=lambda file: file.stem)
def test_study_file_is_valid_and_names_no_machine(file: Path, tmp_path: Path) -> None:
    for name in ("superglue", "glue"):
        (tmp_path / name).mkdir()
    plan = read(file, tmp_path)
    assert {experiment.seed for experiment in plan.experiments} == {0, 1, 2}
    assert not re.search(r"(?<![\w.])/\w", file.read_text())


@pytest.mark.parametrize(("name", "count"), [("few-shot", (6 * 6 + 2 * 3) * 3), ("full", 17 * 3), ("starts", 5 * 3)])
def test_study_file_has_its_number_of_experiments(name: str, count: int, tmp_path: Path) -> None:
    for folder in ("superglue", "glue"):
        (tmp_path / folder).mkdir()
    expanded = read(ROOT / f"docs/results/study/{name}.toml", tmp_path).experiments
    assert len({experiment.hash for experiment in expanded}) == len(expanded) == count


def test_context_starts_from_the_file(ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules.md").write_text("a b c")
    (tmp_path / "sweep.toml").write_text(f'task = "{ticket_task}"\ncontext = "rules.md"')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/rules.md").write_text("another text")
    monkeypatch.chdir(tmp_path / "elsewhere")
    [experiment] = read(tmp_path / "sweep.toml").experiments
    assert experiment.context == str(tmp_path / "rules.md")
    (tmp_path / "rules.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"sweep.toml: context is 'rules.md', but .* has no such file"):
        read(tmp_path / "sweep.toml")
