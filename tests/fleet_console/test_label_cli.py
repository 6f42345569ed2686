"""`shoal label` and `shoal store`, as a person types them."""

import json
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cloud.sample_store import StoredLabel, StoredSample
from cloud.sqlite_store import SqliteSampleStore
from fleet_console import label_cli
from fleet_console.cli import app
from shoal.errors import ConfigError, PayloadError
from shoal.tensors import to_tensor
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER
from shoal.v1.sensor_pb2 import EncodedImage, Scalars, SensorData

EPOCH = bytes(range(16))
HEX = EPOCH.hex()
PIPELINE = Path(__file__).parents[2] / "examples" / "pipelines" / "vision.yaml"
PATIENCE_S = 30.0


DIGIT = SensorData(tensor=to_tensor(np.eye(8, dtype=np.float32)[..., None]))


def sample(seq, reading=DIGIT, **fields):
    values = {
        "device": "cam-00",
        "epoch": EPOCH,
        "seq": seq,
        "model": "digits",
        "gateway": "gw-01",
        "reason": 1,
        "reference": "",
        "captured_at_us": 5,
        "received_at_us": 1000 + seq,
        "reading": (
            reading or SensorData(tensor=to_tensor(np.eye(8, dtype=np.float32)[..., None]))
        ).SerializeToString(),
        "device_release": 1,
        "device_score": 0.5,
        "device_label": 3,
        "gateway_release": 2,
        "gateway_score": seq / 10,
        "gateway_label": 3,
    }
    return StoredSample(**(values | fields))


def word(seq, value=3, author="ann", source=LABEL_SOURCE_PERSON, at=9):
    return StoredLabel("cam-00", EPOCH, seq, value, source, author, at)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cloud.toml"
    path.write_text(
        f'data_dir = "{tmp_path}/data"\n[[models]]\nname = "digits"\npipeline = "{PIPELINE}"\n'
        "[retention]\nkeep_days = 0.0\nmax_age_days = 1.0\n"
    )
    (tmp_path / "data").mkdir()
    return path


@pytest.fixture
def store(config):
    with closing(SqliteSampleStore(config.parent / "data" / "samples.sqlite")) as store:
        yield store


@pytest.fixture
def shoal(config, store, monkeypatch):
    """Run `shoal ...`; an error that the person would read is raised."""
    monkeypatch.setattr(label_cli, "_has_desktop", lambda: False)
    monkeypatch.setenv("SHOAL_AUTHOR", "ann")

    def run(*arguments, **options):
        result = CliRunner().invoke(app, [*arguments, "--config", str(config)], **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def ask(shoal):
    """Sit down and type these lines."""
    return lambda *lines, **options: shoal(
        "label", "--model", "digits", *options.get("more", ()), input="".join(f"{line}\n" for line in lines)
    )


@pytest.fixture
def launched(monkeypatch):
    """What was opened, and what it held then."""
    opened = []
    monkeypatch.setattr("typer.launch", lambda path: opened.append((Path(path), Path(path).read_bytes())))
    return opened


def said(store):
    return {(label.seq, label.author): label.label for label in store.labels.find()}


# -- sitting -----------------------------------------------------------------------------------------------------------


def test_most_valuable_come_first_and_each_answer_is_kept(ask, store):
    """Conflicts, then where the models differ, then what the gateway doubted most; people and models are told after."""
    store.add([sample(1), sample(2), sample(3, gateway_label=8), sample(4), sample(5)])
    store.add_labels([word(1, 7, "bob"), word(1, 1, "eve"), word(4, 3)])
    result = ask("7", "8", "5", "s")
    places = [line for line in result.output.splitlines() if HEX in line]
    assert [line.split(HEX)[1].split(",")[0].strip() for line in places] == ["1", "3", "5", "2"]
    assert "others said 1 and 7; your word settles it" in places[0]
    assert result.output.startswith("digits: 5 samples, 1 labelled, 1 conflicts\n")
    assert "3 labels stored, 1 skipped" in result.output
    assert said(store) | {(1, "ann"): 7} == said(store)
    assert (said(store)[3, "ann"], said(store)[5, "ann"]) == (8, 5)
    assert store.labels.decision(sample(1).key).label == 7
    assert result.exit_code == 0


def test_models_answers_come_after_the_persons(ask, store):
    """Seen before, they would sway it; --reveal is for those who want to check models."""
    store.add([sample(1)])
    place = lambda text: text.index("the device's release 1 said 3, score 0.5; the gateway's release 2 said 3")  # noqa: E731
    blind = ask("s").output
    assert "said 3" not in blind
    shown = ask("s", more=["--reveal"]).output
    assert place(shown) < shown.index("label, s, u, q or ?")
    told = ask("4").output
    assert place(told) > told.index("label, s, u, q or ?")


def test_answer_can_be_taken_back(ask, store):
    """The sample comes again, and what was said of it before stands; at the beginning there is nothing to take back."""
    store.add([sample(1), sample(2)])
    result = ask("u", "5", "u", "6", "7")
    assert "nothing to take back" in result.output
    assert said(store) == {(2, "ann"): 6, (1, "ann"): 7}
    store.add_labels([word(1, 2, "bob", at=10)])
    ask("9", "u", "q")
    assert said(store)[1, "ann"] == 7


def test_slips_are_asked_again(ask, store):
    """No class, no number, and a question for help: nothing is stored of them."""
    store.add([sample(1)])
    result = ask("10", "seven", "?", "", "9")
    assert "Labels go from 0 to 9." in result.output
    assert result.output.count("a number is the label; s skips") == 3
    assert said(store) == {(1, "ann"): 9}


def test_end_of_input_ends_it(ask, store):
    """Nobody there is as good as q; what was said is stored."""
    store.add([sample(1), sample(2)])
    result = ask("4")
    assert (result.exit_code, said(store)) == (0, {(2, "ann"): 4})
    assert "1 labels stored, 0 skipped" in result.output


def test_no_more_are_asked_than_wanted_and_none_where_all_is_said(ask, store):
    """--limit, and a store in which nothing is open."""
    store.add([sample(1), sample(2)])
    assert "1 of 1" in ask("4", more=["--limit", "1"]).output
    ask("4")
    assert "There is nothing to ask." in ask().output


@pytest.mark.parametrize(
    ("reading", "suffix"),
    [
        (DIGIT, ".png"),
        (SensorData(tensor=to_tensor(np.zeros((40, 50, 3), np.uint8))), ".png"),
        (SensorData(tensor=to_tensor(np.full((64, 2), np.nan, np.float32))), ".png"),
        (SensorData(scalars=Scalars(values=[1.0, float("inf")])), ".png"),
        (SensorData(image=EncodedImage(media_type="image/jpeg", data=b"\xff\xd8")), ".jpg"),
    ],
    ids=["grey picture", "colour picture", "window", "scalars", "encoded image"],
)
def test_every_kind_of_reading_becomes_a_file(launched, ask, store, reading, suffix):
    """Its path is printed and it is opened once; the file is there while the person looks, and no longer."""
    store.add([sample(1, reading), sample(2, reading)])
    result = ask("1", "1", more=["--open"])
    ((path, content),) = launched
    assert path.name == f"digits{suffix}"
    assert content.startswith({".png": b"\x89PNG", ".jpg": b"\xff\xd8"}[suffix])
    assert result.output.count(f"{path}\n") == 2
    assert ("@@" in result.output) == (reading is DIGIT)
    assert not path.exists()


def test_reading_that_cannot_be_shown_is_said_and_asked_all_the_same(ask, store):
    """The person skips it, or knows it from elsewhere."""
    store.add([sample(1, SensorData(tensor=to_tensor(np.zeros((0, 3), np.float32))))])
    result = ask("s")
    assert "It cannot be shown: reading.tensor: holds no number" in result.output
    assert result.exit_code == 0


def test_interrupt_loses_nothing(config, store):
    """Ctrl-C in the middle: what was said is stored and told, exit status 130, no traceback."""
    store.add([sample(1), sample(2)])
    command = [sys.executable, "-c", "from fleet_console.cli import main; main()", "label", "--model", "digits"]
    process = subprocess.Popen(
        [*command, "--config", str(config), "--no-open", "--author", "ann"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    process.stdin.write("4\n")
    process.stdin.flush()
    heard = ""
    while "2 of 2" not in heard:
        heard += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    heard += process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 130
    assert "1 labels stored" in heard
    assert "Traceback" not in heard
    assert said(store) == {(2, "ann"): 4}


def test_what_is_missing_is_said(config, tmp_path):
    """Neither a model nor a file; a store that nobody made."""
    for arguments in (["label"], ["label", "--config", str(config)]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, ConfigError)
    result = CliRunner().invoke(app, ["label", "--model", "digits", "--config", str(config)])
    assert "make it with `shoal cloud init`" in str(result.exception)


# -- without questions -------------------------------------------------------------------------------------------------


def test_one_label_is_set_and_what_counts_is_told(shoal, store):
    """Also where people differ, until one settles it."""
    store.add([sample(1)])
    store.add_labels([word(1, 5, "t", LABEL_SOURCE_TEACHER, at=1 << 60)])
    assert "Its label is 4" in shoal("label", "set", "cam-00", HEX, "1", "4", "--note", "clear").output
    differing = shoal("label", "set", "cam-00", HEX, "1", "6", "--author", "bob\x1b[2J").output
    assert "People differ (ann 4, bob?[2J 6)" in differing
    settled = shoal("label", "set", "cam-00", HEX, "1", "6", "--author", "eve", "--settle", "--json").output
    assert json.loads(settled) == {"label": 6, "is_conflict": False}


def test_label_of_no_sample_is_refused(shoal, store):
    """A slip in the key would wait for its sample for ever."""
    with pytest.raises(ConfigError, match=r"no sample cam-00 .* 1 has come"):
        shoal("label", "set", "cam-00", HEX, "1", "4")
    with pytest.raises(PayloadError, match="epoch: "):
        shoal("label", "set", "cam-00", "abc", "1", "4")
    assert said(store) == {}


def test_labels_are_listed_by_model_source_and_words(shoal, store):
    """For people and for machines; a query that is none is one line."""
    store.add([sample(1), sample(2, model="other")])
    store.add_labels([replace(word(1), note="blurred \x1b"), word(2, 4, "t 7", LABEL_SOURCE_TEACHER), word(9)])
    rows = [json.loads(line) for line in shoal("label", "list", "--json").output.splitlines()]
    assert [(row["seq"], row["source"]) for row in rows] == [(1, "person"), (2, "teacher"), (9, "person")]
    assert rows[0]["labelled_at"] == "1970-01-01T00:00:00.000009+00:00"
    for options, seqs in [
        (["--model", "digits"], [1]),
        (["--source", "teacher"], [2]),
        (["--search", "blurred"], [1]),
        (["--limit", "2"], [1, 2]),
    ]:
        found = shoal("label", "list", "--json", *options).output.splitlines()
        assert [json.loads(line)["seq"] for line in found] == seqs
    table = shoal("label", "list").output
    assert table.startswith("device ")
    assert "\x1b" not in table
    with pytest.raises(ConfigError, match="--search"):
        shoal("label", "list", "--search", '"')
    with pytest.raises(PayloadError, match="'oracle'"):
        shoal("label", "list", "--source", "oracle")


def test_conflicts_are_listed(shoal, store):
    """Every word on the samples that people, or teachers, differ about."""
    store.add_labels([word(1, 3), word(1, 4, "bob"), word(2, 3), word(2, 3, "bob")])
    rows = [json.loads(line) for line in shoal("label", "conflicts", "--json").output.splitlines()]
    assert [(row["seq"], row["author"], row["label"]) for row in rows] == [(1, "ann", 3), (1, "bob", 4)]


def test_labels_go_out_and_come_in_as_csv(shoal, store, tmp_path):
    """What was exported is what is imported; a wrong line imports nothing."""
    store.add([sample(1)])
    store.add_labels([replace(word(1), note='said "3", twice\nand again'), word(2, 4, "t 7", LABEL_SOURCE_TEACHER)])
    before = list(store.labels.find())
    shoal("label", "export", str(tmp_path / "labels.csv"))
    for label in before:
        store.labels.take_back(label, None)
    result = shoal("label", "import", str(tmp_path / "labels.csv"))
    assert result.output == "2 labels stored, 1 of samples that have not come\n"
    assert list(store.labels.find()) == before
    assert shoal("label", "export", "-", "--model", "digits").output.count("cam-00") == 1
    bad = f"device,epoch,seq,label\ncam-00,{HEX},5,1\ncam-00,{HEX},6,x\n"
    with pytest.raises(PayloadError, match="line 3"):
        shoal("label", "import", "-", input=bad)
    assert list(store.labels.find()) == before
    with pytest.raises(ConfigError, match="No such file"):
        shoal("label", "import", str(tmp_path / "nothing.csv"))


# -- the store ---------------------------------------------------------------------------------------------------------


def test_store_is_pruned_and_says_what_it_did(shoal, store):
    """First only said, then done; what a person labelled stays."""
    store.add([sample(seq) for seq in range(50)])
    store.add_labels([word(7)])
    dry = json.loads(shoal("store", "prune", "--dry-run", "--json").output)
    assert (dry["dry_run"], dry["too_old"], dry["is_shrinking"]) == (True, 49, True)
    assert store.labels.totals("digits").samples == 50
    assert "49 samples too old and 0 too much dropped" in shoal("store", "prune").output
    assert store.labels.totals("digits").samples == 1
    assert "The store takes" in shoal("store", "prune", "--compact").output
