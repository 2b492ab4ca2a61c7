"""SuperGLUE and GLUE: from the official files and the hub to the same texts, splits that share nothing, and scores."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate, read_splits, sample_examples
from softprompt.prompts.plain import Plain
from softprompt.tasks import METRICS, READERS, SAME_ROWS, TASKS, Answers, Example, load_task, score, splits
from softprompt.tasks.builtin import official
from softprompt.tasks.metrics.texts import referent_match
from softprompt.training.trainer import train

GOLDEN = Path(__file__).parent / "official"
SUPERGLUE = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "wsc-positives": "WSC",
    "axb": "AX-b",
    "axg": "AX-g",
}
GLUE = {
    "sst2": "SST-2",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "glue-rte": "RTE",
    "stsb": "STS-B",
}
DIAGNOSTIC = ("axb", "axg")
TRAINED = [name for name in SUPERGLUE if name not in DIAGNOSTIC]

Rows = list[dict[str, Any]]


def rows_of(name: str) -> Rows:
    """Three rows of ours in a task's official format; `§` becomes a number in those that are many."""
    rows: Rows = json.loads((GOLDEN / "rows.json").read_text())[name]
    return rows


def many(name: str, copies: int) -> Rows:
    """The three rows again and again, each time with other texts, numbered through."""
    text = json.dumps(rows_of(name), ensure_ascii=False)
    rows = [row for number in range(copies) for row in json.loads(text.replace("§", str(number)))]
    return [{**row, "idx": number} for number, row in enumerate(rows)]


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_superglue(folder: Path, copies: int = 6, validation: str = "val.jsonl") -> Path:
    """SuperGLUE's folder as it is downloaded."""
    for name, place in SUPERGLUE.items():
        if name == "wsc-positives":
            continue
        (folder / place).mkdir(parents=True)
        if name in DIAGNOSTIC:
            (folder / place / f"{place}.jsonl").write_text(lines(many(name, copies)))
        else:
            (folder / place / "train.jsonl").write_text(lines(many(name, copies)))
            (folder / place / validation).write_text(lines(many(name, copies + 2)))
            unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in many(name, 1)]
            (folder / place / "test.jsonl").write_text(lines(unlabelled))
    return folder


def write_glue(folder: Path, copies: int = 6) -> Path:
    """GLUE's folder: TSVs without quoting, CoLA's without a header, MRPC's with a byte order mark."""
    for name, place in GLUE.items():
        (folder / place).mkdir(parents=True)
        for file, more in (("train", 0), ("dev_matched" if name == "mnli" else "dev", 2)):
            rows = many(name, copies + more)
            table = [[value for key, value in row.items() if key != "idx"] for row in rows]
            header = [[key for key in rows[0] if key != "idx"]] if name != "cola" else []
            text = "".join("\t".join(row) + "\n" for row in header + table)
            (folder / place / f"{file}.tsv").write_text(text, encoding="utf-8-sig" if name == "mrpc" else "utf-8")
    return folder


@pytest.fixture(scope="module")
def superglue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_superglue(tmp_path_factory.mktemp("superglue"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


def folder_of(name: str, superglue: Path, glue: Path) -> Path:
    return superglue if name in SUPERGLUE else glue


# What the model sees


@pytest.mark.parametrize("name", [*SUPERGLUE, *GLUE])
def test_every_wording_says_what_it_did(name: str, tmp_path: Path) -> None:
    """Three rows in three wordings, letter by letter, beside the answer."""
    folder = write_superglue(tmp_path, 1) if name in SUPERGLUE else write_glue(tmp_path, 1)
    task = TASKS[name]
    rows = READERS[task.source](task, folder)["test" if name in DIAGNOSTIC else "train"]
    found = [
        [
            wording,
            worded.render(row),
            worded.answers[worded.answer(row)] if worded.label_words else list(worded.golds(row)),
        ]
        for wording in ("natural", "dpt", "residual")
        for worded in [load_task(f"{name}:{wording}")]
        for row in rows
    ]
    assert found == json.loads((GOLDEN / "texts.json").read_text())[name]
    assert task == task.using("natural")


def test_ours_asks_what_the_published_copa_leaves_out() -> None:
    row = {"premise": "It rained.", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    texts = {wording: load_task(f"copa:{wording}").render(row) for wording in ("natural", "dpt", "residual")}
    assert [wording for wording, text in texts.items() if "cause" not in text] == ["dpt"]


def test_wsc_has_both_labels_and_its_published_form_one(superglue: Path) -> None:
    both, positives = splits(TASKS["wsc"], str(superglue)), splits(TASKS["wsc-positives"], str(superglue))
    assert set(both.train["label"]) == {True, False}
    assert set(positives.train["label"]) == {True}
    assert len(positives.train) == sum(both.train["label"])


def test_a_span_is_found_beside_its_index_and_within_another() -> None:
    row = {
        "text": "They might use it , and their mothers too.",
        "target": {"span1_index": 5, "span1_text": "their mothers", "span2_index": 5, "span2_text": "Their"},
        "label": False,
    }
    read = TASKS["wsc"], READERS["wsc"]
    assert isinstance(read[1], official.Official)
    (flat,) = read[1].flatten(row)
    (made,) = read[1].prepare(flat)
    assert made["both_marked"] == "They might use it , and * # their # mothers * too."
    (moved,) = read[1].prepare({**flat, "span2_text": "it", "span2_index": 2})
    assert moved["pronoun_marked"] == "They might use *it* , and their mothers too."
    with pytest.raises(ValueError, match="the span 'her' is not in its text"):
        list(read[1].prepare({**flat, "span2_text": "her"}))


# Where the rows come from


@pytest.mark.parametrize("name", [*SUPERGLUE, *GLUE])
def test_a_task_reads_the_whole_folder_and_its_own(name: str, superglue: Path, glue: Path) -> None:
    folder = folder_of(name, superglue, glue)
    whole = splits(TASKS[name], str(folder))
    own = splits(TASKS[name], str(folder / {**SUPERGLUE, **GLUE}[name]))
    assert own.fingerprint == whole.fingerprint
    each = {"multirc": 5, "wsc-positives": 2}.get(name, 3)
    assert len(whole.dev) + len(whole.test) == each * (6 if name in DIAGNOSTIC else 8)
    assert len(whole.train) == (0 if name in DIAGNOSTIC else each * 6)
    assert bool(whole.warnings) is False


def test_validation_goes_by_two_names(tmp_path: Path, superglue: Path) -> None:
    other = write_superglue(tmp_path, validation="validation.jsonl")
    assert splits(TASKS["cb"], str(other)).fingerprint == splits(TASKS["cb"], str(superglue)).fingerprint


HUB_LABELS: dict[str, list[Any]] = {
    "boolq": [False, True],
    "cb": ["entailment", "contradiction", "neutral"],
    "rte": ["entailment", "not_entailment"],
    "wic": [False, True],
    "wsc": [False, True],
    "axb": ["entailment", "not_entailment"],
    "axg": ["entailment", "not_entailment"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "glue-rte": ["entailment", "not_entailment"],
    **{name: ["0", "1"] for name in ("sst2", "cola", "mrpc", "qqp")},
}
"""What the hub's label n means."""


def as_on_hub(name: str, rows: Rows) -> Rows:
    """The same rows with the hub's columns and integer labels."""
    if name == "multirc":
        return [
            {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
                "label": answer["label"],
            }
            for row in rows
            for question in row["passage"]["questions"]
            for answer in question["answers"]
        ]
    if name == "record":
        return [
            {
                "passage": row["passage"]["text"],
                "query": query["query"],
                "entities": ["Bo", "Ann Lee", "Ann"] if "Ann" in query["query"] else query["on_hub"],
                "answers": sorted({answer["text"] for answer in query["answers"]}, reverse=True),
                "idx": {"passage": row["idx"], "query": query["idx"]},
            }
            for row in rows
            for query in row["qas"]
        ]
    names = {
        "mrpc": {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
        "qqp": {"is_duplicate": "label"},
        "mnli": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        "stsb": {"score": "label"},
    }.get(name, {})
    table = [{names.get(key, key): value for key, value in {**row, **row.get("target", {})}.items()} for row in rows]
    known = HUB_LABELS.get(name)
    for row in table:
        row["label"] = known.index(row["label"]) if known else float(row["label"]) if name == "stsb" else row["label"]
        row.pop("target", None)
    return table


@pytest.mark.parametrize("name", [name for name in [*SUPERGLUE, *GLUE] if name not in ("boolq", "wsc-positives")])
def test_the_hub_gives_the_rows_of_the_folder(
    name: str, superglue: Path, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(repository: str, config: str, split: str) -> Dataset:
        asked.append((repository, config, split))
        copies = 6 if split in ("train", "test") else 8
        return Dataset.from_list(as_on_hub(name, many(name, copies)))

    monkeypatch.setattr(official, "load_dataset", load_dataset)
    assert splits(TASKS[name]).fingerprint == splits(TASKS[name], str(folder_of(name, superglue, glue))).fingerprint
    repository = "aps/super_glue" if name in SUPERGLUE else "nyu-mll/glue"
    asked_splits = {"axb": ["test"], "axg": ["test"], "mnli": ["train", "validation_matched"]}
    wanted = asked_splits.get(name, ["train", "validation"])
    assert asked == [(repository, name.removeprefix("glue-"), split) for split in wanted]


def test_without_hub_and_folder_one_sentence_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it\nin many lines")

    monkeypatch.setattr(official, "load_dataset", out_of_reach)
    with pytest.raises(ConnectionError, match=r"^the train rows of cb .*give the official folder .* --data FOLDER$"):
        splits(TASKS["cb"])


def test_a_file_takes_the_place_of_the_training_rows(tmp_path: Path, superglue: Path, monkeypatch: Any) -> None:
    reader = READERS["cb"]
    monkeypatch.setitem(READERS, "cb", lambda task, folder: reader(task, folder or superglue))
    (tmp_path / "own.jsonl").write_text(lines(many("cb", 2)))
    whole = splits(TASKS["cb"], str(tmp_path / "own.jsonl"))
    assert (len(whole.train), len(whole.dev) + len(whole.test)) == (6, 24)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (lambda folder: (folder / "CB" / "val.jsonl").unlink(), "cb", "CB has no val.jsonl or validation.jsonl; give"),
        (
            lambda folder: (folder / "MultiRC" / "train.jsonl").write_text(lines(many("cb", 1))),
            "multirc",
            r"row 1 of .*train.jsonl is not as MultiRC was published \(no 'passage'\)",
        ),
        (
            lambda folder: (folder / "WSC" / "val.jsonl").write_text(
                lines([{**many("wsc", 1)[0], "text": "Nobody at all is in here."}])
            ),
            "wsc",
            r"row 1 of .*val.jsonl is not as WSC was published \(the span .* is not in its text\)",
        ),
        (
            lambda folder: (folder / "CB" / "train.jsonl").write_text(lines(many("rte", 1))),
            "cb",
            "has the label 'not_entailment'.*there are words for entailment, contradiction, neutral",
        ),
    ],
)
def test_what_is_not_official_is_refused(tmp_path: Path, change: Callable[[Path], Any], name: str, said: str) -> None:
    folder = write_superglue(tmp_path)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        splits(TASKS[name], str(folder))


def test_a_cell_of_glue_stands_as_it_is(tmp_path: Path) -> None:
    folder = write_glue(tmp_path)
    file = folder / "QQP" / "train.tsv"
    whole = file.read_text()
    assert '"' in whole
    file.write_text(whole + "7\t8\t9\tcut short\n")
    assert len(splits(TASKS["qqp"], str(folder)).train) == 18
    file.write_text(whole + "7\t8\t9\ta\tb\t1\tone too many\n")
    with pytest.raises(ValueError, match=r"row 19 of .*train.tsv has 7 cells, but there are 6 columns"):
        splits(TASKS["qqp"], str(folder))
    other = folder / "SST-2" / "train.tsv"
    other.write_text(other.read_text() + "no label\n")
    with pytest.raises(ValueError, match=r"row 19 of .*train.tsv has 1 cells"):
        splits(TASKS["sst2"], str(folder))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cbb", "unknown task 'cbb'; did you mean 'cb'"),
        ("multi_rc", "did you mean 'multirc'"),
        ("wsc-positive", "did you mean 'wsc-positives'"),
        ("cb:dtp", "task 'cb' has no template 'dtp'; did you mean 'dpt'"),
    ],
)
def test_a_slip_of_the_pen_is_named(given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_task(given)


# Splits and protocols


@pytest.mark.parametrize("name", [name for name in [*TRAINED, *GLUE] if TASKS[name].group])
def test_halves_share_no_group(name: str, superglue: Path, glue: Path) -> None:
    task = TASKS[name]
    whole = splits(task, str(folder_of(name, superglue, glue)))
    dev, test = set(whole.dev[task.group]), set(whole.test[task.group])
    assert dev
    assert test
    assert not dev & test


@pytest.mark.parametrize(
    ("name", "column"), [("cb", "premise"), ("multirc", "question_id"), ("wsc", "text"), ("sst2", "sentence")]
)
def test_the_halves_are_the_ones_they_were(name: str, column: str, superglue: Path, glue: Path) -> None:
    """For every seed, on every machine and version: the split is part of the task."""
    whole = splits(TASKS[name], str(folder_of(name, superglue, glue)), seed=5)
    assert list(whole.dev[column]) == json.loads((GOLDEN / "splits.json").read_text())[name]


@pytest.mark.parametrize("name", TRAINED)
def test_paper_selects_and_reports_on_the_same_rows(name: str, superglue: Path) -> None:
    halves, whole = splits(TASKS[name], str(superglue)), splits(TASKS[name], str(superglue), protocol="paper")
    assert whole.shared
    assert not halves.shared
    assert whole.dev.to_list() == whole.test.to_list()
    assert len(whole.test) == len(halves.dev) + len(halves.test)
    assert whole.train.to_list() == halves.train.to_list()
    assert whole.fingerprint != halves.fingerprint


def test_paper_needs_an_official_validation_split(ticket_task: Path, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"has no official validation split, which the protocol paper .* use heldout"):
        splits(load_task(str(ticket_task)), protocol="paper")
    with pytest.raises(ValueError, match="protocol is 'papr'; it must be heldout or paper"):
        Experiment(protocol="papr")  # type: ignore[arg-type]
    assert Experiment.from_json(Experiment(protocol="paper").to_json()).protocol == "paper"


@pytest.mark.parametrize(("balanced", "count"), [(True, 6), (False, 2)])
def test_shots_leave_the_papers_validation_whole(superglue: Path, balanced: bool, count: int) -> None:
    few = TrainingConfig(shots=2, shots_balanced=balanced)
    paper = Experiment(task="cb", data=str(superglue), protocol="paper", training=few)
    found = read_splits(paper, TASKS["cb"])
    assert (len(found.train), len(found.dev), found.shared) == (count, 24, True)
    held = read_splits(paper.replace(protocol="heldout"), TASKS["cb"])
    assert (len(held.train), len(held.dev), len(held.test), held.shared) == (count, count, 12, False)
    assert held.train.to_list() == found.train.to_list()


def test_a_diagnostic_is_scored_only(superglue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = READERS["axb"]
    monkeypatch.setitem(READERS, "axb", lambda task, folder: reader(task, folder or superglue))
    with pytest.raises(ValueError, match=r"task 'axb' has no training rows.*softprompt evaluate RUN --task axb"):
        read_splits(Experiment(task="axb", data=str(superglue)), TASKS["axb"])
    with pytest.raises(
        ValueError, match=r"task 'axb' has no training rows for .* to replace; give the official folder"
    ):
        splits(TASKS["axb"], str(superglue / "AX-b" / "AX-b.jsonl"))
    with pytest.raises(ValueError, match="is a folder, and the rows of task 'sentiment' are not read from one"):
        splits(TASKS["sentiment"], str(superglue))
    with pytest.raises(FileNotFoundError, match="there is no nowhere; give a file of training rows, or"):
        splits(TASKS["axb"], "nowhere")


def test_a_run_says_that_it_selected_on_what_it_reports(superglue: Path, llama_folder: Path, tmp_path: Path) -> None:
    """Under `paper`, on all validation rows however few were asked for; the same run then answers the diagnostics."""
    experiment = Experiment(
        backbone=str(llama_folder),
        task="rte",
        data=str(superglue),
        protocol="paper",
        prompt=Plain(length=2),
        training=TrainingConfig(steps=1, batch_size=4, eval_steps=1, dev_rows=3),
    )
    run = train(experiment, out=tmp_path)
    results = run.results
    assert results is not None
    assert (results["protocol"], results["caution"]) == ("paper", SAME_ROWS)
    assert (results["n_dev"], results["n_test"]) == (24, 24)
    assert results["dev"] == results["test"] == evaluate(run).value
    assert "Selected and reported on the same rows" in (run.folder / "README.md").read_text()
    bias = evaluate(run, task="axg", data=str(superglue))
    assert (bias.metric, bias.n, set(bias.others)) == ("accuracy", 18, {"gender_parity"})
    assert evaluate(run, task="axb", data=str(superglue)).metric == "matthews"
    with pytest.raises(ValueError, match="task 'axb' has no dev rows; it can only be scored on its test split"):
        evaluate(run, task="axb", data=str(superglue), split="dev")
    held = train(experiment.replace(protocol="heldout"), out=tmp_path)
    assert held.results is not None
    assert held.results["protocol"] == "heldout"
    assert "caution" not in held.results
    assert "same rows" not in (held.folder / "README.md").read_text()


# Scores


def test_multirc_is_scored_by_answer_and_by_question(superglue: Path) -> None:
    """Ten answers to eight questions; one answer of the first question is wrong."""
    rows = splits(TASKS["multirc"], str(superglue)).train.select(range(10))
    golds = [int(label) for label in rows["label"]]
    ours = list(golds)
    ours[0] = 1 - ours[0]
    questions = list(rows["question_id"])
    found = score(TASKS["multirc"], ours, golds, questions, majority=0, resamples=20)
    assert golds == [1, 0, 1, 1, 0] * 2
    assert questions[:5] == ["0-0", "0-0", "0-1", "1-2", "2-3"]
    assert found.others["question_match"] == pytest.approx(7 / 8)
    # 5 true positives, 1 missed
    assert found.value == pytest.approx(2 * 5 / (2 * 5 + 1))
    assert found.majority == pytest.approx(2 * sum(golds) / (len(golds) + sum(golds)))  # of always saying that it is


def test_parity_asks_for_like_answers_not_for_right_ones() -> None:
    """Pair 0 is answered alike and wrong, pair 1 differently, pair 2 alike and right."""
    answers = Answers(predictions=[0, 1, 0, 0, 0, 0], golds=[1, 1, 1, 0, 1, 0], questions=[0, 1, 0, 2, 1, 2])
    assert METRICS["gender_parity"](answers) == pytest.approx(2 / 3)
    assert METRICS["question_match"](answers) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("prediction", "gold", "matches"),
    [
        ("fuzzy bunny", "The bunny", 1.0),
        ("the bunny", "the fuzzy bunny", 1.0),
        ("Bob", "Bob's hat", 0.0),
        ("Bob's", "Bob's hat", 1.0),
        ("the", "the bunny", 0.0),
        ("", "the bunny", 0.0),
        ("a bunny rabbit", "fuzzy bunny", 0.0),
    ],
)
def test_a_referent_matches_by_words(prediction: str, gold: str, matches: float) -> None:
    assert referent_match(prediction, gold) == matches


def test_questions_are_drawn_whole(superglue: Path) -> None:
    task = TASKS["multirc"]
    table = splits(task, str(superglue)).train
    examples = [Example((1,), (1,), 0, row) for row in range(len(table))]
    drawn = sample_examples(task, table, examples, 7, seed=1)
    chosen = {table["question_id"][example.row] for example in drawn}
    assert 7 <= len(drawn) <= 9
    assert [example.row for example in drawn] == [
        row for row in range(len(table)) if table["question_id"][row] in chosen
    ]
    assert sample_examples(task, table, examples, 7, seed=2) != drawn
    free = dataclasses.replace(task, question="", metrics=("f1",))
    assert len(sample_examples(free, table, examples, 7, seed=1)) == 7
