"""Recipes through notebooks, on small notebooks of our own: order, parameters, failures, resuming."""

import os
import shutil
import subprocess
from itertools import pairwise

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from workbench import Interrupted, WorkbenchError, batch, cli, runs
from workbench.analysis import calibration, thresholds
from workbench.training import augmented

ROOT = runs.project_root()


@pytest.fixture
def root(tmp_path):
    """A project of five notebooks that only write down what they were given."""
    (tmp_path / "notebooks" / "recipes").mkdir(parents=True)
    for number, stage in enumerate(batch.STAGES, 1):
        source = f'run = ""  # the run\nnumber_{number} = {number}  # a whole number\nrate = 0.5  # a number\n'
        if number == 3:
            source += 'resume = False  # go on\nname = "x"  # a text\nnames = []  # a list\nbroken = False  # fail\n'
        cells = [
            new_markdown_cell(f"# {number}\n"),
            new_code_cell(source, metadata={"tags": ["parameters"]}),
            new_markdown_cell(f"## Section of {number}"),
            new_code_cell(
                "from pathlib import Path\n"
                f"told = (run, number_{number}, rate{', resume' if number == 3 else ''})\n"
                "print(told)\n"
                "with open(Path('..') / 'results' / run / 'told.txt', 'a') as file: print(told, file=file)"
            ),
        ]
        if number == 3:
            cells.append(
                new_code_cell(
                    "from workbench import WorkbenchError\n"
                    "if broken: raise WorkbenchError('the shards are broken: write them again.')"
                )
            )
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / f"{stage}.ipynb")
    (tmp_path / "notebooks" / "recipes" / "mine.yml").write_text("# My recipe.\nrate: 2\nnumber_2: 20\n")
    return tmp_path


@pytest.mark.notebooks
def test_a_recipe_runs_through_all_notebooks_in_order(root, capsys):
    before = dict(os.environ)
    folder = batch.run_recipe(root, "mine", overrides={"number_3": 30}, name="whole")
    assert dict(os.environ) == before, "a notebook that is looked at later would get no panel"
    told = (folder / "told.txt").read_text().splitlines()
    assert told == [
        "('whole', 1, 2)",
        "('whole', 20, 2)",
        "('whole', 30, 2, False)",
        "('whole', 4, 2)",
        "('whole', 5, 2)",
    ]
    record = runs.read_run(folder)
    assert record["status"] == "finished"
    assert record["parameters"]["number_2"] == 20
    assert [stage["status"] for stage in record["stages"].values()] == ["finished"] * 5
    executed = nbformat.read(folder / "notebooks" / "03_train.ipynb", as_version=4)
    assert "('whole', 30, 2, False)" in str(executed.cells)
    said = capsys.readouterr().out
    assert "[3/5] 03_train: train on MPI ranks" in said
    assert "Section of 4" in said
    assert "        ('whole', 5, 2)" in said


@pytest.mark.notebooks
def test_a_failed_stage_keeps_its_notebook_and_is_taken_up_again(root):
    with pytest.raises(WorkbenchError, match=r"03_train failed: the shards are broken: write them again\. .*--resume"):
        batch.run_recipe(root, "mine", overrides={"broken": True}, name="twice")
    folder = root / "results" / "twice"
    assert runs.read_run(folder)["status"] == "failed"
    assert (folder / "notebooks" / "03_train.ipynb").exists()
    assert not (folder / "notebooks" / "04_evaluate.ipynb").exists()
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "last.npz").touch()
    batch.resume_run(root, "twice", overrides={"broken": False})
    told = (folder / "told.txt").read_text().splitlines()
    assert told[2:4] == ["('twice', 3, 2, False)", "('twice', 3, 2, True)"]
    assert len(told) == 6
    assert runs.read_run(folder)["status"] == "finished"
    with pytest.raises(WorkbenchError, match="`twice` is finished: nothing is left"):
        batch.resume_run(root, "twice")


@pytest.mark.notebooks
@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_is_a_sentence_and_the_run_goes_on_when_there_is_room(root):
    path = root / "notebooks" / "02_write_shards.ipynb"
    notebook = nbformat.read(path, as_version=4)
    fill = "import contextlib\nwith contextlib.suppress(OSError), open('../results/ballast', 'ab') as file:\n"
    fill += "    while full and file.write(bytes(512)): file.flush()"
    notebook.cells[1].source += "full = True  # whether to fill the disk\n"
    notebook.cells.append(new_code_cell(fill))
    nbformat.write(notebook, path)
    results = root / "results"
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", results], check=True)
    try:
        said = r"cannot be written \(No space left on device\).* go on"
        with pytest.raises(WorkbenchError, match=said):
            batch.run_recipe(root, "mine", name="full")
        (results / "ballast").unlink()
        folder = batch.resume_run(root, "full", overrides={"full": False})
        assert runs.read_run(folder)["status"] == "finished"
        assert len((folder / "told.txt").read_text().splitlines()) == 6
    finally:
        subprocess.run(["umount", "-l", results], check=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rat": 1.0}, r"`rat` of mine is no parameter \(did you mean `rate`\?\); the parameters are broken, name"),
        ({"run": "x"}, "`run` of mine is no parameter"),
        ({"number_1": 1.5}, "`number_1` of mine is 1.5: expected a whole number, such as 1"),
        ({"number_1": True}, "`number_1` of mine is True: expected a whole number"),
        ({"name": 3}, "`name` of mine is 3: expected a text"),
        ({"names": "Edema"}, "`names` of mine is 'Edema': expected a list"),
        ({"broken": "yes"}, "`broken` of mine is 'yes': expected true or false"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_made(root, settings, said):
    with pytest.raises(WorkbenchError, match=said):
        batch.run_recipe(root, "mine", overrides=settings)
    assert not (root / "results").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("- a\n- list\n", "has to be flat YAML"), ("a: [1\n", "is not YAML"), ("1: 2\n", "has to be flat YAML")],
)
def test_bad_recipes_are_refused(root, content, said):
    path = root / "bad.yml"
    path.write_text(content)
    with pytest.raises(WorkbenchError, match=said):
        batch.run_recipe(root, str(path))


@pytest.mark.parametrize("value", ["2001-99-99", "!!int ''", "!!timestamp x", "[" * 3000, "9" * 5000])
def test_values_that_yaml_itself_trips_over_are_refused(root, value):
    (root / "bad.yml").write_text(f"rate: {value}\n")
    with pytest.raises(WorkbenchError, match="is not YAML"):
        batch.run_recipe(root, str(root / "bad.yml"))
    with pytest.raises(WorkbenchError, match=r"The value of `--set rate=.*` cannot be read"):
        batch.parse_settings([f"rate={value}"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rate=.inf", "`rate` of mine is inf: expected a number"),
        ("rate=nan", "`rate` of mine is nan: expected a number"),
        (f"rate={10**400}", "`rate` of mine is 1000.*0000: expected a number"),
        (f"number_1={2**63}", "`number_1` of mine is 9223372036854775808: expected a whole number"),
        (f"number_1=0x{'f' * 5000}", "`number_1` of mine is a number of thousands of digits"),
        ("names=[[Edema]]", "`names` of mine is .*: expected a list"),
        ("names=&a [*a]", "`names` of mine is .*: expected a list"),
        ('name="a\\nb"', "`name` of mine is .*: expected a text of one line"),
        ('name="\\ud800"', "`name` of mine is .*: expected a text of one line"),
    ],
)
def test_values_that_no_record_or_notebook_can_hold_are_refused(root, setting, said):
    with pytest.raises(WorkbenchError, match=said):
        batch.check_parameters(root, batch.parse_settings([setting]), where="mine")


def test_aliases_that_multiply_are_not_written_out(root):
    # 9 to the power of 6 items, half a million.
    bomb = "[&a [x]" + "".join(f", &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefg")) + "]"
    with pytest.raises(WorkbenchError, match=r"`names` of mine is .*: expected a list") as told:
        batch.check_parameters(root, batch.parse_settings([f"names={bomb}"]), where="mine")
    assert len(told.value.args[0]) < 10_000


def test_a_recipe_s_name_may_be_too_long_for_a_file(root):
    with pytest.raises(WorkbenchError, match="There is no recipe"):
        batch.run_recipe(root, "x" * 300)


def test_a_number_without_a_point_is_a_number(root):
    # YAML 1.1 would have it a text.
    assert batch.check_parameters(root, batch.parse_settings(["rate=1e-3"]), where="mine")["rate"] == 0.001
    with pytest.raises(WorkbenchError, match="`rate` of mine is 'fast': expected a number"):
        batch.check_parameters(root, {"rate": "fast"}, where="mine")


def test_unknown_recipes_and_stages_are_refused(root):
    with pytest.raises(WorkbenchError, match="no recipe `yours`: choose one of mine"):
        batch.run_recipe(root, "yours")
    with pytest.raises(WorkbenchError, match="no stage `07`: choose one of 01_explore_dataset"):
        batch.run_recipe(root, "mine", first="07")
    assert not (root / "results").exists()


def test_settings_of_the_command_line_are_yaml():
    assert batch.parse_settings(["epochs=3", "findings=[Edema, Mass]", "name=", "rate=0.1", "x=a=b"]) == {
        "epochs": 3,
        "findings": ["Edema", "Mass"],
        "name": "",
        "rate": 0.1,
        "x": "a=b",
    }
    with pytest.raises(WorkbenchError, match="KEY=VALUE"):
        batch.parse_settings(["epochs"])


@pytest.mark.parametrize("recipe", sorted(batch.recipes(ROOT)))
def test_every_recipe_names_only_parameters_that_there_are(recipe):
    label, chosen = batch.read_recipe(ROOT, recipe)
    batch.check_parameters(ROOT, chosen, where=label)
    head = (ROOT / "notebooks" / "recipes" / f"{recipe}.yml").read_text()
    assert f"workbench run {recipe}" in head
    for told in ("Hardware: ", "Time: ", "Score: "):
        assert told in head


def test_the_recipe_synthetic_is_what_the_notebooks_do_by_themselves():
    _, chosen = batch.read_recipe(ROOT, "synthetic")
    defaults = {}
    for stage in batch.known_parameters(ROOT).values():
        defaults |= stage
    assert {name: defaults[name] for name in chosen} == chosen


def test_notebooks_that_share_a_parameter_agree_on_its_value():
    seen = {}
    for stage, parameters in batch.known_parameters(ROOT).items():
        for name, value in parameters.items():
            assert seen.setdefault(name, value) == value, f"{stage}: {name}"


def test_the_command_line_tells_errors_in_a_sentence(root, monkeypatch, capsys):
    monkeypatch.setenv("WORKBENCH_ROOT", str(root))
    assert cli.main(["run", "yours"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("workbench: There is no recipe `yours`")
    assert "Traceback" not in said
    assert cli.main(["run"]) == 1
    assert "Name either a recipe or --resume RUN" in capsys.readouterr().err
    assert cli.main(["runs"]) == 0
    assert "No runs yet" in capsys.readouterr().out
    runs.create_run(root, "taken")
    assert cli.main(["run", "mine", "--name", "taken"]) == 1
    assert "`taken` exists already" in capsys.readouterr().err
    shutil.rmtree(root / "results")


def test_python_m_workbench_is_the_same_command(tmp_path):
    import subprocess
    import sys

    told = subprocess.run(
        [sys.executable, "-m", "workbench", "run", "nowhere"], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 1
    assert told.stderr.startswith("workbench: There is no recipe `nowhere`: choose one of chexnet")
    assert told.stdout == ""


def test_choices_are_those_of_the_modules_that_use_them():
    assert batch.CHOICES["threshold_rule"] == thresholds.RULES
    assert batch.CHOICES["calibration_method"] == calibration.METHODS
    assert batch.CHOICES["averaged_views"] == augmented.KINDS


@pytest.mark.parametrize("name", list(batch.CHOICES))
def test_what_the_evaluation_would_refuse_is_refused_before_training(name):
    with pytest.raises(WorkbenchError, match=f"`{name}` of here is 'nothing': choose from"):
        batch.check_parameters(ROOT, {name: "nothing"}, where="here")


def test_what_a_kernel_says_while_it_ends_goes_to_its_log(tmp_path, capfd):
    """Libraries print at the end of a kernel what is no error of the run; the reader's stderr stays empty."""
    notebook = nbformat.v4.new_notebook()
    source = "import atexit, os\natexit.register(os.write, 2, b'a library at its end')"
    notebook.cells = [nbformat.v4.new_code_cell(source)]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "run" / "notebooks").mkdir(parents=True)
    nbformat.write(notebook, tmp_path / "notebooks" / "01_explore_dataset.ipynb")
    batch._execute_notebook(tmp_path, tmp_path / "run", "01_explore_dataset", {}, batch._Interrupts())
    assert "a library at its end" in (tmp_path / "run" / "notebooks" / "01_explore_dataset.log").read_text()
    assert "a library at its end" not in capfd.readouterr().err


@pytest.mark.notebooks
def test_an_interrupt_in_the_last_cell_of_a_stage_ends_the_run_before_the_next(root):
    """A kernel that hears it too late, or is about to end, must not let the run go on."""
    notebook = nbformat.read(root / "notebooks" / "01_explore_dataset.ipynb", as_version=4)
    deaf = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    deaf += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(1)"
    notebook.cells.append(nbformat.v4.new_code_cell(deaf))
    nbformat.write(notebook, root / "notebooks" / "01_explore_dataset.ipynb")
    parameters = batch.check_parameters(root, {}, where="here")
    folder = runs.create_run(root, "late", parameters=parameters)
    with pytest.raises(Interrupted, match=r"in 02_write_shards; .* go on with `workbench run --resume late`"):
        batch.execute(root, folder, parameters, list(batch.STAGES))
    record = runs.read_run(folder)
    told = [stage["status"] for stage in record["stages"].values()]
    assert (record["status"], told) == ("interrupted", ["finished", "interrupted"] + ["planned"] * 3)
    nbformat.write(
        nbformat.from_dict(notebook | {"cells": notebook.cells[:-1]}), root / "notebooks" / "01_explore_dataset.ipynb"
    )
    assert runs.read_run(batch.resume_run(root, "late"))["status"] == "finished"


@pytest.mark.notebooks
def test_a_run_that_was_killed_before_its_first_stage_or_after_its_last_is_resumed(root):
    parameters = batch.check_parameters(root, {}, where="here")
    folder = runs.create_run(root, "early", parameters=parameters)
    batch.resume_run(root, "early")
    assert len((folder / "told.txt").read_text().splitlines()) == 5
    runs.update_run(folder, status="running", ended=None)
    batch.resume_run(root, "early")
    assert runs.read_run(folder)["status"] == "finished"
    assert len((folder / "told.txt").read_text().splitlines()) == 5
