"""The comparison's plan, its resume and its report, on made-up records: nothing is trained here."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.pages import append_record, read_records
from benchmarks.quality_plan import (
    ABLATED_ON,
    ASKED,
    BUDGETS,
    GEMMA,
    MAX_CHARACTERS,
    PHASES,
    RATIONAL_ON,
    SECOND,
    SECOND_ON,
    STARTS,
    TASKS,
    VARIANTS,
    count_parameters,
    rates,
    runs_of,
)
from benchmarks.quality_records import Cell, chosen_rates
from benchmarks.quality_tables import average_ranks, difference_table, draw, main_cells, ranks, tables
from examples.prepare_data import SYSTEM_MESSAGE, as_instruction, as_messages, make_splits
from trainers.methods.configs import METHOD_CONFIGS, method_name
from trainers.training.evaluate import ClassificationReport, GenerationReport

SMALL = BUDGETS["small"]
LABELS = [variant.label for variant in VARIANTS]


def fake_outcome(run, accuracy=0.75, loss=2.0):
    if run.task.is_generation:
        return {"count": 100, "loss": loss}
    on = {"on": dict.fromkeys((run.weights, *run.others), accuracy)} if run.others else {}
    return {"count": 100, "accuracy": accuracy, "majority_accuracy": 0.5, **on}


def fake_records(budget=SMALL, accuracy=lambda run: 0.75, loss=lambda run: 2.0, phases=PHASES):
    """A record for every run of ``phases``; later phases follow the rates that the earlier ones choose."""
    records = {}
    for phase in phases:
        for run in runs_of(phase, budget, chosen_rates(budget, records)):
            records.setdefault(run.key, {**run.summary, **fake_outcome(run, accuracy(run), loss(run))})
    return records


def all_keys(budget):
    return {run.key for phase in PHASES for run in runs_of(phase, budget, {})}


@pytest.mark.parametrize("name", BUDGETS)
def test_plan_is_complete(name):
    budget = BUDGETS[name]
    assert {method_name(variant.config) for variant in VARIANTS} == set(METHOD_CONFIGS)
    wanted = {(v.label, task, seed) for v in VARIANTS for task in TASKS for seed in range(budget.seeds)}
    assert {(run.label, run.task, run.seed) for run in runs_of("main", budget, {})} == wanted
    configs = [run.config for run in runs_of("ablations", budget, {}) if run.task == ABLATED_ON[0] and run.seed == 0]
    assert {config.prompt_length for config in configs} == {1, 2, 4, 8}
    assert {config.pooling for config in configs} == {"attention", "mean", "max"}
    assert {config.activation for config in configs} >= {"rational", "gelu", "relu"}
    assert {config.sharing for config in configs} == {"all"}
    asked = [run.config for run in runs_of("rational", budget, {}) if run.task == RATIONAL_ON[0] and run.seed == 0]
    assert {(c.numerator_degree, c.denominator_degree, c.rational_form) for c in asked} >= {(1, 1, "A"), (8, 8, "B")}
    assert {config.init_function for config in asked} == set(STARTS)
    assert {config.coefficients for config in asked} == {"joint", "frozen"}


@pytest.mark.parametrize("name", BUDGETS)
def test_keys_are_unique_within_a_phase(name):
    for phase in PHASES:
        keys = [run.key for run in runs_of(phase, BUDGETS[name], {})]
        assert len(keys) == len(set(keys))


def test_an_ablation_shares_the_main_comparisons_run():
    formats, rates = ({run.key for run in runs_of(phase, SMALL, {})} for phase in ("formats", "second-rates"))
    shared = len(formats & rates)
    assert shared == 2, "the first seed at the centre, with a line break"
    for phase, (_, tasks) in ASKED.items():
        own = {run.key for run in runs_of("main", SMALL, {}) if run.label == "IAPT" and run.task in tasks}
        assert own <= {run.key for run in runs_of(phase, SMALL, {})}
        shared += len(own)
    assert sum(len(runs_of(phase, SMALL, {})) for phase in PHASES) - shared == len(all_keys(SMALL))


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"seed": 9}, {"split": "validation"}, {"task": TASKS[1]}])
def test_every_setting_counts_in_the_key(change):
    run = runs_of("main", SMALL, {})[0]
    assert dataclasses.replace(run, **change).key != run.key
    assert dataclasses.replace(run, phase="rates", label="other").key == run.key


def test_budgets_are_matched_where_claimed():
    for variant in (*VARIANTS, *SECOND):
        share = count_parameters(variant.config, variant.backbone) / variant.backbone.num_parameters
        assert (abs(share - 1) <= 0.1) == variant.is_matched, variant.label


def test_every_method_tries_as_many_rates():
    for budget in BUDGETS.values():
        for variant in (*VARIANTS, *SECOND):
            tried = rates(dataclasses.replace(variant, further=()), budget)
            assert len(set(tried)) == budget.num_rates
            assert tried[budget.num_rates // 2] == variant.centre


def test_rates_beyond_an_edge_are_tried_where_they_are_asked_for():
    further = dataclasses.replace(VARIANTS[0], centre=1e-3, further=(2, -2))
    assert rates(further, SMALL) == (0.000111, 0.000333, 0.001, 0.003, 0.009)
    assert rates(further, BUDGETS["smoke"]) == (0.001,)


def test_rates_tie_towards_the_centre():
    lopsided = next(variant for variant in VARIANTS if variant.further == (2, 3))
    assert chosen_rates(SMALL, fake_records(phases=["rates"]))[lopsided.label] == lopsided.centre


def test_the_best_validation_accuracy_chooses_the_rate():
    best = {label: rates(variant, SMALL)[0] for label, variant in zip(LABELS, VARIANTS, strict=True)}
    records = fake_records(phases=["rates"], accuracy=lambda run: 0.9 if run.learning_rate == best[run.label] else 0.8)
    assert chosen_rates(SMALL, records) == best
    equal = fake_records(phases=["rates"])
    assert chosen_rates(SMALL, equal) == {variant.label: variant.centre for variant in VARIANTS}
    equal.popitem()
    assert LABELS[-1] not in chosen_rates(SMALL, equal)


def test_a_diverged_rate_is_not_chosen():
    records = {}
    for run in runs_of("rates", SMALL, {}):
        last = run.learning_rate == rates(next(v for v in VARIANTS if v.label == run.label), SMALL)[-1]
        records[run.key] = fake_outcome(run) if last else {"error": "the loss became nan"}
    chosen = chosen_rates(SMALL, records)
    assert chosen == {variant.label: rates(variant, SMALL)[-1] for variant in VARIANTS}


def write_rows(path: Path, count: int, start: int) -> Path:
    lines = [json.dumps({"instruction": f"text {n}", "output": f"{n % 2}"}) for n in range(start, start + count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_splits_are_disjoint_and_stay_the_same(tmp_path):
    training, held_out = write_rows(tmp_path / "a.train.jsonl", 900, 0), write_rows(tmp_path / "a.eval.jsonl", 500, 900)
    budget = dataclasses.replace(SMALL, train_rows=500, validation_rows=100, test_rows=300)
    paths = make_splits(training, held_out, tmp_path / "splits", budget.rows, MAX_CHARACTERS)
    rows = {name: path.read_text(encoding="utf-8").splitlines() for name, path in paths.items()}
    assert {name: len(lines) for name, lines in rows.items()} == {"train": 500, "validation": 100, "test": 300}
    assert len(set().union(*rows.values())) == 900
    assert set(rows["test"]) <= {
        as_messages(line, MAX_CHARACTERS) for line in held_out.read_text(encoding="utf-8").splitlines()
    }
    again = make_splits(training, held_out, tmp_path / "again", budget.rows, MAX_CHARACTERS)
    assert all(paths[name].read_bytes() == again[name].read_bytes() for name in paths)


def test_rows_become_messages_with_texts_cut():
    row = {"instruction": "Good or bad?", "input": "word " * 50, "output": "good"}
    system, user, assistant = json.loads(as_messages(json.dumps(row), MAX_CHARACTERS))["messages"]
    question, text = user["content"].split("\n\n")
    assert (system["content"], question, assistant["content"]) == (SYSTEM_MESSAGE, "Good or bad?", "good")
    assert text.split() == ["word"] * (MAX_CHARACTERS // 5)
    free = json.loads(as_messages(json.dumps({"instruction": "Write.", "output": "x"}), MAX_CHARACTERS))
    assert free["messages"][1] == {"role": "user", "content": "Write."}
    other = json.loads(as_instruction(json.dumps(row), MAX_CHARACTERS))
    assert other == {"instruction": f"Good or bad?\n\n{text}", "output": "good"}


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Runs the driver with a made-up `execute`; returns the runs that it did."""
    import prepare_data

    def prepare(task):
        rows = [(f"{task}.train.jsonl", 900, 0), (f"{task}.eval.jsonl", 500, 900)]
        return tuple(write_rows(tmp_path / name, count, start) for name, count, start in rows)

    monkeypatch.setattr(prepare_data, "prepare", prepare)

    def drive(*words, fail_after=None, second_model=True):
        done = []

        def execute(run, model, splits, say):
            if len(done) == fail_after:
                raise KeyboardInterrupt
            assert model == ("gemma.gguf" if run.backbone.name == GEMMA.name else str(quality.MODEL))
            rows = splits["train"].read_text(encoding="utf-8").splitlines()
            assert ("instruction" in json.loads(rows[0])) == (run.backbone.name == GEMMA.name)
            done.append(run)
            return fake_outcome(run)

        monkeypatch.setattr(quality, "execute", execute)
        folders = ["--results", str(tmp_path / "results.jsonl"), "--splits", str(tmp_path / "splits")]
        models = ["--second-model", "gemma.gguf"] if second_model else []
        return quality.main(["run", "--budget", "smoke", *folders, *models, *words]), done

    return drive


def test_a_second_run_goes_on_where_the_first_stopped(driver, tmp_path, capsys):
    code, first = driver(fail_after=7)
    assert (code, len(first)) == (130, 7)
    assert "the same command goes on" in capsys.readouterr().out
    code, second = driver()
    assert code == 0
    keys = [run.key for run in first + second]
    assert len(keys) == len(set(keys)) and set(keys) == all_keys(BUDGETS["smoke"])
    assert driver() == (0, [])
    records = read_records(tmp_path / "results.jsonl")
    assert [record["key"] for record in records] == keys
    assert all(record["seconds"] >= 0 and record["machine"] and record["versions"]["torch"] for record in records)


def test_later_phases_wait_for_the_rates(driver):
    with pytest.raises(SystemExit, match="run the phase 'rates' first"):
        driver("--only", "main")
    driver("--only", "rates")
    with pytest.raises(SystemExit, match=r"chosen yet for IAPT, Gemma, .*; run the phase 'second-rates' first"):
        driver("--only", "second")


def test_the_second_backbone_has_runs_of_its_own(driver, capsys):
    _, done = driver("--only", "formats", "second-rates", "second", second_model=False)
    assert done == []
    assert "second is left out; it needs --second-model, gemma-3-270m's" in capsys.readouterr().out
    _, done = driver("--only", "second-rates", "second")
    assert done and all(run.backbone is GEMMA for run in done)
    trained = [run for run in done if run.phase == "second" and run.config is not None]
    assert len(trained) == len(SECOND) * len(SECOND_ON) * 3 and len(done) - len(trained) == len(SECOND) + len(SECOND_ON)
    assert {run.train_config.prompt_format for run in trained} == {"newline"}  # this backbone has no chat template
    assert not {run.key for run in trained} & {run.key for run in runs_of("main", BUDGETS["smoke"], {})}


def test_the_formats_are_compared_on_the_second_backbone(driver, tmp_path):
    _, done = driver("--only", "formats")
    assert Counter((run.train_config.prompt_format, run.config is None) for run in done) == {
        ("plain", False): 6,
        ("plain", True): 1,
        ("newline", False): 6,
        ("newline", True): 1,
    }
    made = tables(BUDGETS["smoke"], {record["key"]: record for record in read_records(tmp_path / "results.jsonl")})[
        "formats"
    ]
    header, _, *lines = made.splitlines()
    assert header == "|  | plain | newline |"
    assert [line.split(" | ")[0] for line in lines] == ["| plain backbone, Gemma", "| IAPT, Gemma", "| LoRA, Gemma"]
    _, more = driver("--only", "second-rates")
    assert len(more) == len(SECOND) - 2, "the centre's runs are the same"


def test_only_and_seeds_narrow_the_plan(driver):
    _, done = driver("--only", "rates", "main", "--seeds", "2", "--steps", "3")
    assert {run.phase for run in done} == {"rates", "main"}
    assert {run.seed for run in done if run.phase == "main"} == {0, 1}
    assert {run.train_config.max_steps for run in done} == {3}


def test_cells_show_mean_and_spread():
    assert str(Cell((0.80, 0.84), False)) == "82.0 ± 2.8"
    assert str(Cell((0.8,), False)) == "80.0"
    assert str(Cell((1.5, 1.6), True)) == "1.550 ± 0.071"
    assert str(Cell((), False)) == "–"
    assert str(Cell((0.8,), False, num_failed=1)) == "80.0 (1 diverged)"


def test_ranks_share_places_and_turn_round_for_loss():
    scores = {"a": 0.9, "b": 0.8, "c": 0.8}
    cells = {
        label: {task.name: Cell((value,), task.is_generation) for task in TASKS} for label, value in scores.items()
    }
    assert ranks(cells, TASKS[0]) == {"a": 1, "b": 2.5, "c": 2.5}
    assert ranks(cells, TASKS[-1]) == {"b": 1.5, "c": 1.5, "a": 3}
    assert average_ranks(cells)["a"] == pytest.approx((1 + 1 + 1 + 3) / 4)


def test_a_difference_is_bold_beyond_twice_its_error():
    levels = {"IAPT": 0.60, "LoRA": 0.90, "ADePT": 0.40}
    records = fake_records(
        accuracy=lambda run: levels.get(run.label, 0.62) + 0.01 * run.seed,
        loss=lambda run: 3.0 - levels.get(run.label, 0.62) + 0.01 * run.seed,
    )
    text = difference_table(main_cells(SMALL, records))
    assert "| LoRA | **+30.0** | **+30.0** | **+30.0** | **+0.300** |" in text
    assert "| ADePT | **-20.0** | **-20.0** | **-20.0** | **-0.200** |" in text
    assert "| DePT | +2.0 | +2.0 | +2.0 | **+0.020** |" in text
    text = tables(SMALL, records)["comparison"]
    assert "| IAPT | 58,161 | 60.5 ± 0.7 |" in text and "| **90.5 ± 0.7** |" in text


def test_losses_of_one_seed_decide_nothing():
    one = dataclasses.replace(SMALL, seeds=1)
    records = fake_records(one, loss=lambda run: 1.0 if run.label == "IAPT" else 2.0)
    assert "| LoRA | +0.0 | +0.0 | +0.0 | -1.000 |" in difference_table(main_cells(one, records))


def test_methods_that_share_the_first_place_are_all_bold():
    levels = {"IAPT": 0.9, "LoRA": 0.9, "ADePT": 0.9}
    text = tables(SMALL, fake_records(accuracy=lambda run: levels.get(run.label, 0.3)))["comparison"]
    assert text.count("**90.0 ± 0.0**") == 9  # three methods on three tasks


def page_with(path, names):
    blocks = "\n".join(f"<!-- table {name} -->\nOLD\n<!-- end -->\n\nBecause of {name}." for name in names)
    path.write_text(f"# Results\n\n{blocks}\n", encoding="utf-8")
    return path


@pytest.mark.thorough
def test_report_replaces_tables_and_keeps_what_people_wrote(tmp_path, capsys):
    records = fake_records()
    for record in records.values():
        append_record(tmp_path / "results.jsonl", {**record, "seconds": 60.0})
    page = page_with(tmp_path / "results.md", tables(SMALL, records))
    words = ["report", "--results", str(tmp_path / "results.jsonl"), "--page", str(page)]
    for _ in range(2):
        assert quality.main(words) == 0
        text = page.read_text(encoding="utf-8")
        assert all(
            content in text and f"Because of {name}." in text for name, content in tables(SMALL, records).items()
        )
        assert "OLD" not in text and text.count("| IAPT |") == 4
    assert f"{len(records)} of {len(records)} runs are done" in capsys.readouterr().out
    for image in ("main", "ablations", "rational"):
        assert (tmp_path / "images" / f"results-{image}.png").stat().st_size > 5000
    page_with(page, ["rates", "other"])
    with pytest.raises(SystemExit, match=r"differ in the tables ablations .*, differences, formats, other, rational"):
        quality.main(words)


@pytest.mark.thorough
@pytest.mark.parametrize("phases", [[], ["baseline", "rates"]])
def test_tables_of_an_unfinished_plan(phases, tmp_path):
    records = fake_records(phases=phases)
    text = tables(SMALL, records)["comparison"]
    assert "| IAPT | 58,161 | – | – | – | – | – |" in text
    draw(SMALL, records, tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["results-main.png"]


def test_a_record_keeps_what_was_measured():
    report = ClassificationReport(("a", "b"), 10, 0.6, 0.5, {"a": 1.0}, ((5, 0), (4, 1)))
    shares = {"accuracy": 0.6, "majority_accuracy": 0.5, "top_label_share": 0.9}
    assert quality.figures(report) == {"count": 10, **shares}
    assert quality.figures(GenerationReport(3, 30, 1.5, 4.48)) == {"count": 3, "loss": 1.5}


def test_a_diverged_training_is_an_outcome_and_nothing_else_is(monkeypatch):
    from iapt_export.contract.errors import IaptError
    from trainers.training import train as training
    from trainers.training.loop import DivergedError

    run = runs_of("main", SMALL, {})[0]

    def fail(error):
        monkeypatch.setattr(training, "train", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        return quality.execute(run, "model", {"train": Path("t"), "test": Path("e")}, print)

    assert fail(DivergedError("the loss became nan at step 3")) == {"error": "the loss became nan at step 3"}
    with pytest.raises(IaptError, match="the loss of the file"):
        fail(IaptError("the loss of the file"))


def test_main_cells_follow_the_chosen_rates():
    records = fake_records()
    assert all(len(cell.scores) == SMALL.seeds for row in main_cells(SMALL, records).values() for cell in row.values())
