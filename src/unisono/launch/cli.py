"""The `unisono` command. It imports torch only once it has work to do, so that `unisono --help` answers at once."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from unisono.errors import ConfigurationError, UnisonoError
from unisono.version import __version__
from unisono.world import World, room_for_workers, threads_from_environment, usable_cores

_DEMOS = Path(__file__).parent.parent / "demos"
_GRACE_S = 120.0


def _demos() -> list[str]:
    """Names of the examples that come with unisono."""
    return sorted(file.stem for file in _DEMOS.glob("*.py") if not file.stem.startswith("_"))


def _workers(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int | None, int] | None:
    """A number of workers, or the fewest and the most: (None, N) or (MIN, MAX)."""
    if value is None:
        return None
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", value)
    least, most = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if match is None or not 1 <= least <= most:
        raise click.BadParameter(f"{value!r} is neither a number of workers such as 4 nor a range such as 2:8")
    return (least if match[1] else None), most


def _meet(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """Host and port."""
    if value is None:
        return None
    match = re.fullmatch(r"([^:]+):(\d+)", value)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise click.BadParameter(f"{value!r} is not an address such as node1:29400")
    return match[1], int(match[2])


def _launch_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `run` and `demo` share."""
    for option in _OPTIONS:
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "--profile",
        is_flag=True,
        help="Like --trace, and run torch.profiler over the same steps: one file per worker.",
    ),
    click.option(
        "--trace",
        is_flag=True,
        help="Write a Chrome/Perfetto trace of five steps on all workers, from the third step on, to RUN_DIR/trace (without "
        "a run directory ./trace).",
    ),
    click.option(
        "--grace",
        "grace_s",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        default=_GRACE_S,
        show_default=True,
        help="How long workers may take to save their work and leave after Ctrl-C or SIGTERM.",
    ),
    click.option(
        "--wait",
        "wait_s",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        default=300.0,
        show_default=True,
        help="How long to wait for missing workers (fewer than MIN) or hosts.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        metavar="R",
        default=3,
        show_default=True,
        help="Total number of replacements of dead workers, and of restarts of all from a checkpoint.",
    ),
    click.option(
        "--hosts",
        type=click.IntRange(min=1),
        metavar="N",
        default=1,
        show_default=True,
        help="Number of hosts to wait for at the start; others may join later. Needs --meet.",
    ),
    click.option(
        "--meet",
        callback=_meet,
        metavar="HOST:PORT",
        help="Where several hosts meet: an address of one of them, and a free port there. Run the same command on each.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="T",
        help="Threads per worker; default: OMP_NUM_THREADS, or 1. Another number may give other weights.",
    ),
    click.option(
        "--workers",
        callback=_workers,
        metavar="N|MIN:MAX",
        help="Number of workers. Default: one per GPU, or without GPUs one per usable core (divided by --threads), but no "
        "more than the Trainer's microbatches. MIN:MAX keeps that within bounds; with fewer than MIN workers left, the run "
        "waits for more.",
    ),
)


class Command(click.Command):
    """A command that reports a setting it cannot use as a usage error."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            raise click.UsageError(str(error), ctx) from None


class Commands(click.Group):
    """Commands that exit with 130 on a Ctrl-C that arrives before they handle it themselves; click would exit with 1."""

    command_class = Command

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _interruptible():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _interruptible():
            return super().invoke(ctx)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="unisono", message="%(prog)s %(version)s")
def main() -> None:
    """Data-parallel PyTorch training with bit-identical weights for any number of workers."""
    _open_closed_streams()


def _open_closed_streams() -> None:
    """Redirect closed streams (`>&-`) to /dev/null: otherwise the next file to be opened would get the number, and Python would
    have no stream object for it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r"))


@main.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Run a training script on the workers of one or several hosts.",
)
@_launch_options
@click.argument("script", type=click.Path(exists=True, dir_okay=False, readable=True))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(context: click.Context, /, script: str, args: tuple[str, ...], **options: Any) -> None:
    """Run SCRIPT with ARGS on the workers of this host, or with --meet of several.

    Options of unisono go before SCRIPT, the script's own after it.
    """
    if astray := _options_astray(context, script, args):
        goes = "goes" if len(astray) == 1 else "go"
        click.echo(
            f"unisono: {', '.join(astray)} after the script {goes} to the script; options of unisono run come before it", err=True
        )
    sys.exit(_run(script, args, **options))


def _options_astray(context: click.Context, script: str, args: tuple[str, ...]) -> list[str]:
    """Options of ours after the script, where the script does not seem to have such options itself."""
    ours = {
        word: param.name
        for param in context.command.params
        if isinstance(param, click.Option)
        for word in param.opts
        if word.startswith("--")
    }
    words = itertools.takewhile(lambda word: word != "--", args)
    found = dict.fromkeys(name for word in words if (name := word.partition("=")[0]) in ours)
    if not found:
        return []
    text = Path(script).read_text(encoding="utf-8", errors="replace")
    default = click.core.ParameterSource.DEFAULT
    return [
        name
        for name in found
        # Given before the script as well, or known to the script, it is meant for the script.
        if context.get_parameter_source(ours[name] or "") is default and not re.search(rf"""(["']){name}\1""", text)
    ]


@main.command(
    context_settings={"ignore_unknown_options": True},
    short_help=f"Run an example: {', '.join(_demos())}.",
    help=f"""Run the example NAME that comes with unisono: {", ".join(_demos())}.

    Options that unisono does not know go to the example; `unisono demo NAME --help` lists them. For example:
    unisono demo vision --workers 2 --epochs 3""",
)
@_launch_options
@click.option("--copy", is_flag=True, help="Do not run it: copy its file into this folder, to change it.")
@click.option("-h", "--help", "asks", is_flag=True, help="Show this message and exit; after NAME, show the example's options.")
@click.argument("name", metavar="NAME", required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo(context: click.Context, /, name: str | None, args: tuple[str, ...], copy: bool, asks: bool, **options: Any) -> None:
    """Run or copy an example (the help text is given to the decorator, because it names the examples)."""
    if name is None and asks:
        click.echo(context.get_help())
        return
    names = ", ".join(_demos()) or "none"
    if name is None:
        raise click.UsageError(f"Missing argument 'NAME'; there are: {names}")
    if name not in _demos():
        raise click.BadParameter(f"no demo {name!r}; there are: {names}", param_hint="NAME")
    file = _DEMOS / f"{name}.py"
    if asks:
        _show_options(file)
        return
    if copy:
        _copy_here(file)
        return
    sys.exit(_run(str(file), args, **options))


def _show_options(file: Path) -> None:
    """The example's own help."""
    sys.argv[:] = [str(file), "--help"]
    with contextlib.suppress(SystemExit):  # argparse's, once it has shown them
        runpy.run_path(str(file), run_name="__main__")
    click.echo("\nOptions of unisono, such as --workers and --copy, are taken as well: unisono demo --help lists them.")


def _copy_here(file: Path) -> None:
    target = Path(file.name)
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(file.read_text(encoding="utf-8"))
    except FileExistsError:
        raise click.UsageError(f"{target} is there already: move it away first") from None
    click.echo(f"{target} is yours to change; unisono run {target} runs it")


@main.command(short_help="Write one HTML file that shows a run, or compares several.")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="The file to write.")
@click.option("--open", "open_page", is_flag=True, help="Open it in the browser.")
@click.argument("run_dirs", metavar="RUN_DIR [RUN_DIR...]", nargs=-1, required=True)
def report(run_dirs: tuple[str, ...], output: str | None, open_page: bool) -> None:
    """Write one HTML file that shows a run, or compares several; it needs no network to be viewed. Needs the extra `report`.

    By default RUN_DIR/report.html, or comparison.html in the current folder for several runs.
    """
    from unisono.report import command

    try:
        written = command.write_report(run_dirs, output=output)
    except UnisonoError as error:
        raise click.ClickException(str(error)) from None
    click.echo(written)
    if open_page and not command.show(written):
        raise click.ClickException(f"no browser could be opened here; open {written} yourself")


@main.command(short_help="Show the report of a run live, in the browser.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="PORT", help="Where to listen; default: any free port.")
@click.option("--open", "open_page", is_flag=True, help="Open it in the browser.")
@click.argument("run_dir")
def watch(run_dir: str, port: int, open_page: bool) -> None:
    """Show the report of RUN_DIR live, to browsers on this machine, until Ctrl-C.

    The run may train here or on any host that writes to the same folder; it need not have begun. Needs the extra `report`.
    """
    from unisono.report import command

    try:
        command.watch(run_dir, port=port, open_page=open_page, say=click.echo)
    except UnisonoError as error:
        raise click.ClickException(str(error)) from None


@main.command(short_help="Check this machine (or all hosts) for what a run needs.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many workers a run will have; default: as unisono run would choose. Not under a launcher, which says it.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="T", help="Threads per worker; default: OMP_NUM_THREADS, or 1. As --workers."
)
@click.option("--run-dir", metavar="DIR", default="runs", show_default=True, help="Where a run would write: a path or URL.")
@click.option("--json", is_flag=True, help="Print findings and the facts behind them as JSON.")
def doctor(workers: int | None, threads: int | None, run_dir: str, json: bool) -> None:
    """Check this machine (or all hosts) for what a run needs. Exit status 1 if there is a problem.

    Several hosts: torchrun ... -m unisono.doctor on each; rank 0 shows links and differences between them.
    """
    world = World.from_environment()
    if world.size > 1 and (workers or threads):
        raise click.UsageError(f"{world.launcher} has started {world.size} workers already: leave --workers and --threads to it")
    from unisono.doctor.command import doctor

    sys.exit(doctor(world, workers=workers, threads=threads, run_dir=run_dir, json=json))


@main.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Check that a script trains the same on any number of workers.",
)
@click.option("--workers", metavar="N,N,...", help="Numbers of workers to compare with one; default: 2, 3 and the usable cores.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Optimizer steps to look at.")
@click.option("--threads", type=click.IntRange(min=1), metavar="T", help="Threads per worker; default: OMP_NUM_THREADS, or 1.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option("--against", metavar="RUN_DIR", help="Reproduce the beginning of this finished run instead.")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, readable=True), required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def verify(
    script: str | None,
    args: tuple[str, ...],
    *,
    workers: str | None,
    steps: int,
    threads: int | None,
    as_json: bool,
    against: str | None,
) -> None:
    """Check that SCRIPT trains the same on any number of workers and on a plain loop; or show the first difference and its cause.

    It trains a few steps, many times, on up to as many processes as the largest number of workers, and leaves run directories
    alone. Ends with 0 if all is equal, 1 if not, 2 if that could not be told. Options of unisono go before SCRIPT.
    """
    from unisono.verify import command

    if against is not None:
        try:
            sys.exit(command.verify_against(against, script, args, steps=steps, as_json=as_json))
        except UnisonoError as error:
            raise click.UsageError(str(error)) from None
    if script is None:
        raise click.UsageError("Missing argument 'SCRIPT'.")
    threads = threads or threads_from_environment(os.environ)
    counts = None if workers is None else _counts(workers)
    sys.exit(command.verify(script, args, workers=counts, steps=steps, threads=threads, as_json=as_json))


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of numbers of workers such as 2,3,8", param_hint="--workers")
    return [int(part) for part in parts]


def _run(
    script: str,
    args: tuple[str, ...],
    *,
    workers: tuple[int | None, int] | None,
    threads: int | None,
    trace: bool,
    profile: bool,
    **options: Any,
) -> int:
    from unisono.launch import runner
    from unisono.launch.config import LaunchConfig

    if trace or profile:
        os.environ["UNISONO_TRACE"] = "profile" if profile else "phases"  # workers inherit it
    if options["hosts"] > 1 and options["meet"] is None:
        raise click.UsageError(f"--hosts {options['hosts']} needs --meet HOST:PORT, the address at which the hosts meet")
    threads = threads or threads_from_environment(os.environ)
    cores, room = usable_cores(), room_for_workers(threads)
    minimum, most = workers or (1, room)
    config = LaunchConfig(
        script=script,
        args=args,
        workers=most if minimum is None else max(minimum, min(most, room)),
        workers_defaulted=minimum is not None,
        minimum=minimum or 1,
        threads=threads,
        **options,
    )
    if (need := config.workers * threads) > cores:
        click.echo(f"unisono: {need} threads ({config.workers} workers x {threads}) share {cores} cores", err=True)
    status = runner.run(config)
    # The run is over and its status is known: a Ctrl-C that comes while the interpreter shuts down must not change it.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return status


if __name__ == "__main__":
    main()
