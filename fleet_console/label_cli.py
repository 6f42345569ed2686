"""`shoal label`: ask a person, a file or a teacher model for labels, and see what was said."""

import csv
import getpass
import io
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.errors import ConfigError

if TYPE_CHECKING:
    from cloud.sample_store import StoredLabel
    from cloud.sqlite_store import SqliteSampleStore

label_app = typer.Typer(
    help="Label samples: look at them one after the other, take labels from a file, or let a teacher model speak.",
    invoke_without_command=True,
)
_INTERRUPTED = 130

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The cloud's TOML file.", exists=True, dir_okay=False)
]
ModelOption = Annotated[str, typer.Option(help="Whose samples.")]
AuthorOption = Annotated[
    str, typer.Option(envvar="SHOAL_AUTHOR", help="Who says it; the user's name by default.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]


class _Screen:
    """A terminal, and the desktop around it where there is one."""

    def __init__(self, *, opens: bool) -> None:
        self._opens = opens

    def say(self, text: str) -> None:
        typer.echo(text)

    def show(self, path: Path) -> None:
        typer.echo(path)
        if self._opens:
            # Once: viewers follow what the file becomes.
            self._opens = False
            typer.launch(str(path))

    def ask(self, prompt: str) -> str:
        typer.echo(prompt, nl=False)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line


@label_app.callback()
def label(
    context: typer.Context,
    *,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The cloud's TOML file.", exists=True, dir_okay=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Whose samples.")] = None,
    author: AuthorOption = "",
    limit: Annotated[int, typer.Option(min=1, help="Ask for so many at most.")] = 100,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show what device and gateway answered before, not after: it sways people.")
    ] = False,
    opens: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the picture; by default where there is a desktop.")
    ] = None,
) -> None:
    """Show samples one after the other and ask for their labels, those first that a label helps most.

    First what people differ about, then what nobody labelled: where device and gateway differ, then what the gateway
    doubted most. Each answer is stored at once; Ctrl-C loses none.
    """
    if context.invoked_subcommand is not None:
        return
    if config is None or model is None:
        raise ConfigError("`shoal label` needs --config and --model; `shoal label --help` tells more")
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from cloud.teacher_release import load_model_task  # noqa: PLC0415
    from fleet_console.labelling import HELP, Labelling  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    with _open_store(config) as store:
        totals = store.labels.totals(model)
        questions = store.labels.queue(model, limit)
        typer.echo(f"{model}: {totals.samples} samples, {totals.labelled} labelled, {totals.conflicts} conflicts")
        if not questions:
            typer.echo("There is nothing to ask.")
            return
        task = load_model_task(load_config(config, CloudSettings), model)
        classes = None if task is None else task.classes
        known = "" if classes is None else f" from 0 to {classes - 1}"
        typer.echo(f"{HELP[0].upper()}{HELP[1:]}. Labels{known}.")
        with tempfile.TemporaryDirectory(prefix="shoal-label-") as folder:
            screen = _Screen(opens=_has_desktop() if opens is None else opens)
            sitting = Labelling(
                store, screen, _author(author), picture=Path(folder) / model, classes=classes, reveal=reveal
            )
            try:
                sitting.run(questions)
            except KeyboardInterrupt:
                typer.echo(f"\n{sitting.outcome.labelled} labels stored")
                raise typer.Exit(_INTERRUPTED) from None
        typer.echo(f"{sitting.outcome.labelled} labels stored, {sitting.outcome.skipped} skipped")


@label_app.command("set")
def set_label(
    device: Annotated[str, typer.Argument(help="The sample's device.")],
    epoch: Annotated[str, typer.Argument(help="The epoch of its outbox, 32 hex digits.")],
    seq: Annotated[str, typer.Argument(help="Its number there.")],
    value: Annotated[int, typer.Argument(metavar="LABEL", min=0, max=(1 << 32) - 1, help="What it is.")],
    config: ConfigOption,
    *,
    author: AuthorOption = "",
    note: Annotated[str, typer.Option(help="Why, for others to read and search.")] = "",
    settle: Annotated[
        bool, typer.Option("--settle", help="You have seen what others said, and this decides it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Label one sample as a person; it stands above teachers and devices."""
    from cloud.label_csv import parse_key  # noqa: PLC0415
    from cloud.sample_store import StoredLabel  # noqa: PLC0415
    from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON  # noqa: PLC0415

    key = parse_key(device, epoch, seq)
    with _open_store(config) as store:
        if not store.labels.is_known(key):
            raise ConfigError(f"no sample {device} {epoch} {seq} has come")
        said = StoredLabel(
            key.device, key.epoch, key.seq, value, LABEL_SOURCE_PERSON, _author(author), _now_us(), note, settle
        )
        store.add_labels([said])
        decision = store.labels.decision(key)
        words = store.labels.words(key)
    counts = None if decision is None else decision.label
    if as_json:
        typer.echo(json.dumps({"label": counts, "is_conflict": decision is not None and decision.is_conflict}))
    elif counts is None:
        others = ", ".join(
            f"{_printable(word.author)} {word.label}" for word in words if word.source == LABEL_SOURCE_PERSON
        )
        typer.echo(f"Stored. People differ ({others}), so it has no label until somebody says --settle.")
    else:
        typer.echo(f"Stored. Its label is {counts}.")


@label_app.command("list")
def list_labels(
    config: ConfigOption,
    *,
    model: Annotated[str | None, typer.Option(help="Of samples of this model only.")] = None,
    source: Annotated[str | None, typer.Option(help="person, teacher or device.")] = None,
    search: Annotated[str | None, typer.Option(help="Words that author or note must hold.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Print what was said of samples, by their keys."""
    from cloud.labels import parse_source  # noqa: PLC0415

    number = None if source is None else parse_source(source)
    with _open_store(config) as store:
        try:
            found = list(store.labels.find(model=model, source=number, words=search, limit=limit))
        except sqlite3.OperationalError as exc:
            if search is None:
                raise
            raise ConfigError(f"--search {search!r}: {exc}") from exc
    _print(found, as_json=as_json)


@label_app.command()
def conflicts(
    config: ConfigOption,
    *,
    model: Annotated[str | None, typer.Option(help="Of samples of this model only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many words.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Print what was said of samples on which persons, or teachers, differ. `shoal label` asks about them first."""
    with _open_store(config) as store:
        found = list(store.labels.find(model=model, only_conflicts=True, limit=limit))
    _print(found, as_json=as_json)


@label_app.command()
def export(
    file: Annotated[Path, typer.Argument(help="The CSV file to write; - is standard output.")],
    config: ConfigOption,
    *,
    model: Annotated[str | None, typer.Option(help="Of samples of this model only.")] = None,
) -> None:
    """Write every word on every sample as CSV, which `shoal label import` reads."""
    from cloud.label_csv import COLUMNS, format_labels  # noqa: PLC0415

    with _open_store(config) as store, _open_for_writing(file) as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(format_labels(store.labels.find(model=model)))


@label_app.command("import")
def import_labels(
    file: Annotated[Path, typer.Argument(help="A CSV file, see docs/labels.md; - is standard input.")],
    config: ConfigOption,
    *,
    author: AuthorOption = "",
    as_json: JsonOption = False,
) -> None:
    """Take labels from a CSV file: all of it, or none where a line is wrong."""
    from cloud.label_csv import parse_labels  # noqa: PLC0415

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    # As it is: line ends within a note are the note's.
    labels = list(parse_labels(io.StringIO(text, newline=""), author=_author(author), now_us=_now_us()))
    with _open_store(config) as store:
        store.add_labels(labels)
        waiting = sum(not store.labels.is_known(label.key) for label in labels)
    if as_json:
        typer.echo(json.dumps({"labels": len(labels), "waiting_for_samples": waiting}))
    else:
        typer.echo(f"{len(labels)} labels stored" + (f", {waiting} of samples that have not come" if waiting else ""))


@label_app.command()
def auto(
    config: ConfigOption,
    *,
    model: ModelOption,
    precision: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="How often its labels must be right, shown on held-out rows.")
    ] = 0.99,
    limit: Annotated[int, typer.Option(min=1, help="Label so many samples at most.")] = 10_000,
    artefact: Annotated[
        Path | None,
        typer.Option(help="A larger .onnx or .tflite model of the same input, that never learnt from held-out rows."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let the gateway's newest model, or a larger one, label what nobody labelled and it is sure of.

    How sure it must be is measured on rows that no release was trained on. A person's word stands above it.
    """
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from cloud.teacher import label_unlabelled, measure_sureness  # noqa: PLC0415
    from cloud.teacher_release import held_out, load_model_task, load_teacher  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    settings = load_config(config, CloudSettings)
    task = load_model_task(settings, model)
    if task is None:
        raise ConfigError(f"{model} has no pipeline, and so no task that knows its classes and held-out rows")
    teacher = load_teacher(settings, model, artefact)
    with _open_store(config) as store:
        sureness = measure_sureness(teacher, held_out(task, store), precision)
        taught = label_unlabelled(store, teacher, sureness, model=model, shape=task.shape, limit=limit, now_us=_now_us)
    if as_json:
        typer.echo(json.dumps({"teacher": teacher.name, "sureness": asdict(sureness), **asdict(taught)}))
        return
    typer.echo(
        f"{teacher.name} was right on {sureness.right} of {sureness.rows} held-out rows of certainty "
        f"{sureness.limit:.4f} and above: at least {sureness.precision_bound:.2%} of its labels are right."
    )
    typer.echo(f"{taught.labelled} samples labelled, {taught.unsure} left to people, {taught.unreadable} unreadable")


@contextmanager
def _open_store(config: Path) -> "Iterator[SqliteSampleStore]":
    from cloud.services import open_samples  # noqa: PLC0415
    from cloud.settings import CloudSettings  # noqa: PLC0415
    from shoal.config import load_config  # noqa: PLC0415

    store = open_samples(load_config(config, CloudSettings))
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _open_for_writing(file: Path) -> "Iterator[Any]":
    if str(file) == "-":
        yield sys.stdout
        return
    try:
        with file.open("w", encoding="utf-8", newline="") as out:
            yield out
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc


def _print(found: "list[StoredLabel]", *, as_json: bool) -> None:
    from cloud.label_csv import COLUMNS, format_labels  # noqa: PLC0415

    rows = list(format_labels(found))
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    table = [COLUMNS, *([_printable(str(cell)) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _printable(text: str) -> str:
    """Authors come from afar; a terminal obeys what it is sent."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _author(given: str) -> str:
    if given:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError) as exc:
        raise ConfigError("nobody knows this user's name: say --author") from exc


def _has_desktop() -> bool:
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _now_us() -> int:
    return time.time_ns() // 1000
