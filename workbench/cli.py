"""The command `workbench`: recipes, runs, data sets and a look at the machine.

workbench run synthetic --set epochs=3
workbench runs
"""

from __future__ import annotations

import argparse
import signal
import sys

from workbench import Interrupted, WorkbenchError, __version__


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error told in a sentence, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    # A job that a batch system ends is ended as Ctrl-C would: recorded, with nothing left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return options.call(options) or 0
    except WorkbenchError as error:
        sys.stdout.flush()  # where both go to one file, the sentence comes last
        print(f"workbench: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> None:
    if bool(options.recipe) == bool(options.resume):
        raise WorkbenchError("Name either a recipe or --resume RUN: `workbench run synthetic`, say.")
    from workbench import batch, runs

    root, settings = runs.project_root(), batch.parse_settings(options.set)
    if options.cluster:
        # Another place than the recipe was written for: all that it takes, unless a number is asked for.
        workers = {} if options.resume else {"workers": 0}
        settings = {"cluster_name": options.cluster, **workers, **settings}
    if options.resume:
        from workbench import rerun

        folder = batch.resume_run(root, options.resume, overrides=settings, first=options.first)
        rerun.finish(folder)
    else:
        folder = batch.run_recipe(root, options.recipe, overrides=settings, name=options.name, first=options.first)
    _summarise(folder)


def _sweep(options: argparse.Namespace) -> None:
    from workbench import batch, runs, sweep

    root, grid = runs.project_root(), sweep.parse_grid([word for words in options.grid for word in words])
    name = options.name or sweep.name_of(options.recipe)
    settings = batch.parse_settings(options.set)
    if options.cluster:
        # As in `_run`.
        settings = {"cluster_name": options.cluster, **({} if "workers" in grid else {"workers": 0}), **settings}
    points = sweep.plan_sweep(root, options.recipe, grid, overrides=settings, name=name)
    if options.dry_run:
        for point in points:
            print(f"{point.name}: {point}, {sweep.status_of(root, point)}")
        return
    sweep.run_sweep(root, name, points, at_once=options.at_once)


def _rerun(options: argparse.Namespace) -> int:
    from workbench import batch, rerun, runs

    root, settings = runs.project_root(), batch.parse_settings(options.set)
    if options.check:
        plan = rerun.plan_rerun(root, options.run, overrides=settings)
        rerun.tell(plan)
        return int(bool(plan.differences))
    _summarise(rerun.rerun(root, options.run, overrides=settings, name=options.name))
    return 0


def _summarise(folder) -> None:
    from workbench import runs

    record, metrics = runs.read_run(folder), runs.read_metrics(folder).get("test", {})
    if None not in (metrics.get(name) for name in ("mean_auroc", "ci_low", "ci_high")):
        print(
            f"mean test AUROC {metrics['mean_auroc']:.4f} (95 % interval {metrics['ci_low']:.4f} to "
            f"{metrics['ci_high']:.4f}, {metrics.get('findings', '?')} findings)"
        )
    if {"images_per_second", "world_size"} <= record.keys():
        print(f"{record['images_per_second']:.1f} images/s in training on {record['world_size']} workers")
    print(f"{runs.minutes(record) or 0:.1f} minutes in all; the whole as one page: {folder / 'report.html'}")
    print(folder)


def _runs(options: argparse.Namespace) -> None:
    from workbench import runs

    if options.html:
        from workbench import report

        print(report.write_overview(runs.project_root()))
        return
    table = runs.list_runs(runs.project_root())
    if table.empty:
        print("No runs yet: `workbench run synthetic` makes one.")
        return
    print(table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4g}"))


def _watch(options: argparse.Namespace) -> int:
    from workbench import runs
    from workbench.training import progress

    folder = runs.find_run(runs.project_root(), options.run, having=runs.PROGRESS)
    print(folder, flush=True)
    progress.follow(folder)
    return int(progress.read(folder)["status"] != "finished")


def _compare(options: argparse.Namespace) -> None:
    from workbench import runs
    from workbench.analysis import comparison, evaluation, plots
    from workbench.files import written_whole

    root, sides = runs.project_root(), []
    for named in (options.first, options.second):
        files = [runs.find_run(root, name, having=f"predictions-{options.split}.csv") for name in named.split("+")]
        read = [evaluation.read_predictions(folder / f"predictions-{options.split}.csv") for folder in files]
        sides.append(comparison.average_predictions(read))
    table = comparison.compare_predictions(*sides, resamples=options.resamples, seed=options.seed)
    print(table.to_string(float_format=lambda value: f"{value:.4f}", na_rep=""))
    mean, images = table.loc["mean"], len(sides[0][2])
    print(
        f"mean AUROC on {images:,} {options.split} images: {options.first} {mean['first']:.4f}, {options.second} "
        f"{mean['second']:.4f}, difference {mean['difference']:+.4f} (95 % interval {mean['ci_low']:+.4f} to "
        f"{mean['ci_high']:+.4f})"
    )
    name = f"compare-{options.first}"
    axes = plots.plot_comparison(table, first=options.first, second=options.second)
    runs.save_figure(axes, files[-1], name)
    with written_whole(files[-1] / "figures" / f"{name}.csv") as part:
        table.to_csv(part)
    print(files[-1] / "figures" / f"{name}.png")


NOTICE = "Research software, not a medical device: not for diagnosis."


def _predict(options: argparse.Namespace) -> int:
    from pathlib import Path

    from workbench import runs
    from workbench.analysis import predictions
    from workbench.files import written_whole

    folder = runs.find_run(runs.project_root(), options.run, having="model.keras")
    files = predictions.find_files(options.files)
    print(f"{len(files)} files, run {folder.name}. {NOTICE}", flush=True)
    from workbench.training import reading

    answer = reading.read_files(
        folder,
        files,
        heat_maps=bool(options.heat_maps),
        tell=lambda count: print(f"  {count} of {len(files)} files", flush=True) if len(files) > 16 else None,
    )
    table = predictions.judge_scores(answer["scores"], folder)
    for file, rows in table.groupby("file", sort=False):
        print(f"\n{file}")
        print(predictions.format_judgement(rows.sort_values("probability", ascending=False)))
    print(f"\n{predictions.describe_judgement(table)} {NOTICE}")
    if options.csv:
        with written_whole(options.csv) as part:
            table.to_csv(part, index=False)
        print(options.csv)
    if options.heat_maps and len(answer["scores"]):
        from workbench.analysis import plots

        Path(options.heat_maps).mkdir(parents=True, exist_ok=True)
        named = zip(answer["scores"].index, answer["radiographs"], answer["maps"], answer["mapped"], strict=True)
        for number, (file, pixels, heat, finding) in enumerate(named, 1):
            axes = plots.plot_heat_maps([pixels], [heat], [f"{finding}\n{Path(file).name}"])
            runs.save_chart(axes, Path(options.heat_maps) / f"{number:03d}-{Path(file).stem}.png")
        print(options.heat_maps)
    for why in answer["refused"].values():
        print(f"workbench: {why}", file=sys.stderr)
    return int(bool(answer["refused"]))


def _doctor(options: argparse.Namespace) -> int:
    from workbench import runs

    if options.cluster and not options.recipe:
        if options.set or not options.timing:
            raise WorkbenchError("--set and --no-timing belong to a recipe: `workbench doctor synthetic`, say.")
        from workbench import rollcall
        from workbench.training import sites

        return rollcall.main(sites.read_site(runs.project_root(), options.cluster))
    if not options.recipe:
        if options.set or not options.timing:
            raise WorkbenchError("--set and --no-timing belong to a recipe: `workbench doctor synthetic`, say.")
        from workbench import doctor

        return doctor.main(folder=runs.project_root())
    from workbench import batch, preflight

    overrides = batch.parse_settings(options.set) | ({"cluster_name": options.cluster} if options.cluster else {})
    return preflight.main(runs.project_root(), options.recipe, overrides=overrides, timing=options.timing)


def _download(options: argparse.Namespace) -> None:
    from workbench.data import download

    download.download(options.folder, jobs=options.jobs, keep_archives=options.keep_archives)


def _verify(options: argparse.Namespace) -> int:
    from workbench.data import verify

    return int(verify.verify_folder(options.folder, processes=options.processes)["bad"] > 0)


def _synthesize(options: argparse.Namespace) -> None:
    from workbench.data import synthetic

    folder = synthetic.write_synthetic(
        options.folder, patients=options.patients, image_size=options.image_size, seed=options.seed
    )
    print(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workbench",
        description="Train and evaluate chest-radiograph models: five notebooks, run headlessly or in JupyterLab.",
    )
    parser.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="carry a recipe through the five notebooks",
        description="Carry a recipe through the five notebooks and print the run's folder. Recipes: "
        + "; ".join(_recipes())
        + ".",
    )
    run.add_argument("recipe", nargs="?", default="", metavar="RECIPE", help="a recipe's name, or a .yml file")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a parameter; may be given repeatedly"
    )
    run.add_argument(
        "--cluster",
        default="",
        metavar="NAME",
        help="run the workers there, as many as it takes: a name of clusters.yml",
    )
    run.add_argument("--name", default="", help="the run's name (default: recipe and time)")
    run.add_argument("--from", dest="first", default="", metavar="STAGE", help="begin with this stage, such as 03")
    run.add_argument("--resume", default="", metavar="RUN", help="go on with a run where it stopped")
    run.set_defaults(call=_run)

    sweep = commands.add_parser(
        "sweep",
        help="run a recipe with every combination of some values, and table the results",
        description="Run a recipe with every combination of the values, one run each, in processes of their own: one "
        "that fails stops no other. The same command again leaves what is finished and resumes what broke off. "
        "Writes results/sweeps/NAME.csv and .png, with mean and spread over seeds if `seed` is in the grid.",
    )
    sweep.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or a .yml file")
    sweep.add_argument(
        "--grid", nargs="+", action="append", required=True, metavar="KEY=V,V", help="a parameter and its values"
    )
    sweep.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a parameter; may be given repeatedly"
    )
    sweep.add_argument(
        "--name", default="", help="the sweep's name, with which its runs' begin (default: RECIPE-sweep)"
    )
    sweep.add_argument(
        "--cluster", default="", metavar="NAME", help="run each point's workers there, see `workbench run`"
    )
    sweep.add_argument("--at-once", type=int, default=1, metavar="N", help="points that run at a time (default: 1)")
    sweep.add_argument("--dry-run", action="store_true", help="only list the points and what has become of them")
    sweep.set_defaults(call=_sweep)

    rerun = commands.add_parser(
        "rerun",
        help="repeat a run from its folder alone, and compare the results",
        description="Repeat a run in a new one with the parameters of its record: first it tells what differs from "
        "then (versions, code, machine, data, parameters), afterwards what came out differently, if anything did.",
    )
    rerun.add_argument("run", metavar="RUN", help="a run under results/, or the folder of a run from elsewhere")
    rerun.add_argument("--name", default="", help="the new run's name (default: the old one's and the time)")
    rerun.add_argument("--check", action="store_true", help="only tell what differs; ends with 1 if anything does")
    rerun.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a parameter; may be given repeatedly"
    )
    rerun.set_defaults(call=_rerun)

    all_runs = commands.add_parser("runs", help="all runs as a table, the newest first")
    all_runs.add_argument("--html", action="store_true", help="write them as a page, results/index.html, with links")
    all_runs.set_defaults(call=_runs)

    watch = commands.add_parser(
        "watch",
        help="show a run's training while it runs, and how it ended",
        description="Show a training that runs anywhere on this file system, and how it ended. Ctrl-C ends only the "
        "watching. Ends with 1 if the training did not finish.",
    )
    watch.add_argument("run", nargs="?", default="", metavar="RUN", help="a run under results/ (default: the newest)")
    watch.set_defaults(call=_watch)

    predict = commands.add_parser(
        "predict",
        help="read radiographs with a trained run: PNG, JPEG or DICOM",
        description="Read radiographs with a trained run: a probability per finding (corrected where notebook 04 "
        f"fitted a calibration), and whether it is above the run's threshold. {NOTICE}",
    )
    predict.add_argument("run", metavar="RUN", help="a run under results/")
    predict.add_argument("files", metavar="FILE", nargs="+", help="PNG, JPEG or DICOM files, or folders of them")
    predict.add_argument("--csv", metavar="OUT", help="write the table as CSV as well, a row a file and finding")
    predict.add_argument("--heat-maps", metavar="DIR", help="draw into DIR where the network looks, one PNG a file")
    predict.set_defaults(call=_predict)

    compare = commands.add_parser(
        "compare",
        help="how much better one run reads than another, with intervals",
        description="Compare two runs on the same images: AUROC differences with paired intervals over patients, "
        "DeLong's test, Holm's correction, and a chart in the second run's folder. Runs joined by + are averaged "
        "first, so `workbench compare a a+b+c` shows what an ensemble gains.",
    )
    compare.add_argument("first", metavar="RUN", help="a run, or several joined by +")
    compare.add_argument("second", metavar="RUN", help="the run that is held against it, or several joined by +")
    compare.add_argument("--split", default="test", choices=("test", "val"), help="of which images (default: test)")
    compare.add_argument("--resamples", type=int, default=1000, help="of the patients (default: 1000)")
    compare.add_argument("--seed", type=int, default=0, help="the same seed, the same intervals (default: 0)")
    compare.set_defaults(call=_compare)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine can do, and what is missing; with a recipe, what that would do here",
        description="Look at the machine, and say what to do about what is missing. With a recipe, say what it would "
        "do here before it is run: images, steps and what an epoch leaves out, memory, disk, reading speed, and time, "
        "by a few real training steps. Ends with 1 if training, or the recipe, cannot run.",
    )
    doctor.add_argument("recipe", nargs="?", default="", metavar="RECIPE", help="a recipe's name, or a .yml file")
    doctor.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a parameter; may be given repeatedly"
    )
    doctor.add_argument(
        "--no-timing",
        dest="timing",
        action="store_false",
        help="train no steps, which takes about a minute; the time is then an earlier run's, if there is one",
    )
    doctor.add_argument(
        "--cluster", default="", metavar="NAME", help="where the workers run; alone: start them, and say what they have"
    )
    doctor.set_defaults(call=_doctor)

    download = commands.add_parser(
        "download", help="fetch NIH's twelve archives of images (42 GB), resumed and verified"
    )
    download.add_argument("folder", metavar="DIR", help="where to put them, such as data/nih")
    download.add_argument("--jobs", type=int, default=3, help="archives fetched at a time (default: 3)")
    download.add_argument("--keep-archives", action="store_true", help="keep the archives after unpacking them")
    download.set_defaults(call=_download)

    verify = commands.add_parser(
        "verify",
        help="check shards or raw data, and name each bad file",
        description="Check a folder of shards (sizes, SHA-256, every record's checksum, labels) or raw data in NIH's "
        "layout (table, lists, boxes, every image there and decodable), and name each bad file. Ends with 1 if one is.",
    )
    verify.add_argument("folder", metavar="DIR", help="a folder of shards, or of raw data")
    verify.add_argument("--processes", type=int, default=0, help="that decode images (default: one per core)")
    verify.set_defaults(call=_verify)

    synthesize = commands.add_parser("synthesize", help="write a small made-up data set in NIH's layout")
    synthesize.add_argument("folder", metavar="DIR", help="a folder that does not exist yet")
    synthesize.add_argument("--patients", type=int, default=480, help="number of patients (default: 480)")
    synthesize.add_argument("--image-size", type=int, default=96, help="side in pixels (default: 96)")
    synthesize.add_argument("--seed", type=int, default=0, help="the same seed, the same images (default: 0)")
    synthesize.set_defaults(call=_synthesize)
    return parser


def _recipes() -> list[str]:
    # By file name alone: reading them would import YAML for every `--help`.
    from workbench.runs import project_root

    return sorted(path.stem for path in (project_root() / "notebooks" / "recipes").glob("*.yml"))


if __name__ == "__main__":
    sys.exit(main())
