"""Pipeline files: what is taken, and that every error has the line it is about."""

from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cloud.pipelines.file import ByTier, Kind, Pipeline, PruneModel, file_digest, load_pipeline, parse_pipeline
from shoal.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "pipelines").glob("*.yaml"))
GOOD = """\
model: digits
task: vision
parameters: {data: digits}
steps:
  - name: train_model
    inputs: samples
    outputs: trained
  - name: prune_model
    inputs: [trained, samples]
    outputs: pruned
    parameters:
      ratio: {gateway: 0.5}
  - name: quantize_model
    inputs: [pruned, samples]
    outputs: quantized
  - name: evaluate_model
    inputs: [quantized, samples, field]
    outputs: release
  - name: deploy_to_edge
    inputs: release
    targets: edge_server_*
"""


def refused(text):
    with pytest.raises(ConfigError) as error:
        parse_pipeline(text, "p.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_pipelines(path):
    """What ships can be run."""
    assert load_pipeline(path).steps[-1].step_name == "deploy_to_edge"


def test_good_file_says_what_it_says():
    """Names may be one or a list, and a step's kinds follow from its name."""
    pipeline = parse_pipeline(GOOD, "p.yaml")
    train, prune, *_, evaluate, deploy = pipeline.steps
    assert (train.input_names, train.output, train.makes) == (["samples"], "trained", Kind.MODULES)
    assert isinstance(prune, PruneModel)
    assert prune.parameters.ratio == ByTier(gateway=0.5)
    assert (prune.parameters.ratio_of("gateway"), prune.parameters.ratio_of("device")) == (0.5, None)
    assert evaluate.input_names == ["quantized", "samples", "field"]
    assert (deploy.output, deploy.target_patterns) == ("deploy_to_edge", ["edge_server_*"])


WRONG = [
    ("model: digits", "model: Digits", 1, "'Digits' is not an id"),
    ("task: vision\n", "", 1, "missing required field `task`"),
    ("data: digits}", "data: digits}\nseeds: 3", 4, "unknown field `seeds`"),
    ("name: prune_model", "name: prune_models", 8, "Invalid value 'prune_models'"),
    ("ratio: {gateway: 0.5}", "ratio: {gateway: 1.5}", 12, "Expected `float` < 1.0"),
    ("ratio: {gateway: 0.5}", "ratio: {edge: 0.5}", 12, "unknown field `edge`"),
    ("ratio: {gateway: 0.5}", "rounds: 2", 11, "missing required field `ratio`"),
    ("inputs: [pruned, samples]", "inputs: [pruned]", 14, "quantize_model needs an input of kind samples"),
    ("inputs: [pruned, samples]", "inputs: [shorn, samples]", 14, "needs 'shorn', which no step before it makes"),
    ("inputs: [pruned, samples]", "inputs: [pruned, samples, field]", 14, "does not take 'field' (a field)"),
    ("inputs: [pruned, samples]", "inputs: [pruned, trained, samples]", 14, "takes one modules, not 2"),
    ("outputs: pruned", "outputs: trained", 10, "there is a 'trained' already"),
    ("outputs: pruned", "outputs: [pruned, rest]", 10, "makes one output, 2 are named"),
    ("targets: edge_server_*", "target: edge_server_*", 21, "unknown field `target`"),
    ("task: vision", "task: vision\ntask: sensor", 3, "'task' is there twice"),
    ("targets: edge_server_*", "targets: [edge_server_*", 22, "expected ',' or ']'"),
    ("parameters: {data: digits}", "parameters: &a [*a]", 3, "nested too deep"),
    ("steps:", "triggers: {hours: ['25:00-06:00']}\nsteps:", 4, "Expected `str` matching regex"),
]


@pytest.mark.parametrize(("good", "bad", "line", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_error_names_the_line(good, bad, line, said):
    """Whoever reads it need not search."""
    assert good in GOOD
    message = refused(GOOD.replace(good, bad, 1))
    assert message.startswith(f"p.yaml:{line}: "), message
    assert said in message


@pytest.mark.parametrize("text", ["", "3", "- a", "steps: []", "model: a\ntask: b\nsteps: []\n", "\x00"])
def test_no_pipeline_is_refused(text):
    """Also what is YAML, or nothing at all."""
    assert refused(text).startswith("p.yaml:")


def test_file_that_is_not_there_is_an_error_of_the_operator(tmp_path):
    """And so is one of bytes that are no text."""
    with pytest.raises(ConfigError, match="No such file"):
        load_pipeline(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"bytes\.yaml"):
        load_pipeline(tmp_path / "bytes.yaml")


@given(text=st.text(alphabet=" :-[]{}&*!|>'\"%@`#\n\tabnstepo0123.", max_size=60))
def test_any_text_is_a_pipeline_or_an_error_with_a_name(text):
    """No input takes the parser down."""
    with suppress(ConfigError):
        parse_pipeline(text, "p.yaml")


def test_digest_is_of_what_is_said_not_of_how():
    """Comments and layout are free; any value counts."""
    pipeline = parse_pipeline(GOOD, "p.yaml")
    again = yaml.safe_dump(msgspec.to_builtins(pipeline))
    assert file_digest(parse_pipeline("# note\n" + again, "q.yaml")) == file_digest(pipeline)
    assert file_digest(msgspec.structs.replace(pipeline, seed=1)) != file_digest(pipeline)
    assert isinstance(pipeline, Pipeline)
