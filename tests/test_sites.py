"""clusters.yml: what it may say, and the sentence for what it may not."""

import re

import pytest
import yaml

from workbench import WorkbenchError, runs
from workbench.training import sites, slurm


def write(folder, told):
    (folder / sites.FILE).write_text(told if isinstance(told, str) else yaml.safe_dump(told))
    return folder


def test_without_a_file_there_is_this_host(tmp_path):
    assert sites.read_site(tmp_path, "local") == sites.Site()


def test_the_file_that_comes_along_is_right_and_so_are_its_examples(tmp_path):
    root = runs.project_root()
    assert sites.read_site(root, "local").kind == "local"
    text = (root / sites.FILE).read_text()
    folder = write(tmp_path, re.sub(r"(?m)^# (?=( |servers|gpu))", "", text))
    assert sites.read_site(folder, "servers").slots == 8
    gpu = sites.read_site(folder, "gpu")
    assert (gpu.kind, gpu.slots, gpu.time, gpu.modules) == ("slurm", 16, "08:00:00", ("cuda/12.4",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "`kind` is None: it has to be one of local, hosts, slurm"),
        ({"kind": "pbs"}, "`kind` is 'pbs'"),
        ({"kind": "local", "nodes": 2}, "no setting `nodes` of local"),
        ({"kind": "slurm", "node": 2}, "no setting `node` of slurm: there are kind, nodes, tasks_per_node"),
        ({"kind": "slurm", "nodes": 0}, "`nodes` is 0: it has to be a whole number, 1 or more"),
        (
            {"kind": "slurm", "time": 480},
            '`time` is 480: it has to be a time in quotes, as Slurm takes it, such as "08',
        ),
        ({"kind": "slurm", "partition": "gpu; rm"}, "`partition` is 'gpu; rm': it has to be a name without spaces"),
        ({"kind": "slurm", "setup": "module load x"}, "`setup` is 'module load x': it has to be a list of texts"),
        ({"kind": "slurm", "setup": ["a\nb"]}, "`setup` is .*: it has to be a list of texts of one line each"),
        ({"kind": "slurm", "queue_limit": -1}, "`queue_limit` is -1: it has to be a number of minutes"),
        ({"kind": "hosts"}, "`hosts` is missing: name each host"),
        ({"kind": "hosts", "hosts": ["a"]}, r"`hosts` is \['a'\]: it has to be names of hosts, each with a number"),
        ({"kind": "hosts", "hosts": {"-oProxyCommand=x": 1}}, "`hosts` is .*: it has to be names of hosts"),
        ({"kind": "hosts", "hosts": {"a": True}}, "`hosts` is .*: it has to be names of hosts"),
    ],
)
def test_what_it_may_not_say_is_told_with_the_place(settings, said, tmp_path):
    with pytest.raises(WorkbenchError, match=f"{sites.FILE}, cluster mine: .*{said}"):
        sites.read_site(write(tmp_path, {"mine": settings}), "mine")


@pytest.mark.parametrize("text", ["a: [", "- a", "mine: 3", "\0", "1: {kind: local}"])
def test_a_file_that_is_no_list_of_clusters_is_one_sentence(text, tmp_path):
    with pytest.raises(WorkbenchError, match=sites.FILE):
        sites.read_site(write(tmp_path, text), "mine")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    folder = write(tmp_path, {"mine": {"kind": "slurm"}})
    with pytest.raises(WorkbenchError, match=r"no cluster `yours` in .*: choose one of local, mine"):
        sites.read_site(folder, "yours")


def test_more_workers_than_slots_are_refused():
    site = sites.make_site("two", {"kind": "hosts", "hosts": {"node1": 2, "node2": 1}})
    site.check_workers(3)
    for workers in (0, 4):
        with pytest.raises(WorkbenchError, match=rf"is {workers}, and the cluster two takes 1 to 3 \(node1 2, node2 1"):
            site.check_workers(workers)


def test_a_job_asks_for_what_its_workers_need(tmp_path):
    settings = {"kind": "slurm", "nodes": 4, "tasks_per_node": 4, "gpus_per_node": 4, "partition": "gpu"}
    site = sites.make_site("gpu", settings | {"options": ["--mem=64G"], "modules": ["cuda"], "setup": ["ulimit -l"]})
    told = {"name": "x", "log": tmp_path / "log", "mpiexec": ["mpiexec", "--bind-to", "none"], "command": "engine"}
    lines = slurm.write_script(site, workers=6, **told).splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=2", "ntasks=6", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "mem=64G"} <= asked
    # A login shell knows `module`.
    assert lines[0] == "#!/bin/bash -l"
    assert lines[-3:] == ["module load cuda || exit 1", "ulimit -l", "exec mpiexec --bind-to none -n 6 engine"]
