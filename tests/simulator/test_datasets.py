import gzip
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits as load_digits_of_sklearn

from cloud.tasks import datasets as of_the_trainer
from shoal.errors import ConfigError
from simulator import datasets


def test_shuttle_is_the_real_thing(shuttle_data):
    """Pins size, type and the published number of anomalies."""
    assert shuttle_data.values.shape == (49097, 9)
    assert shuttle_data.values.dtype == np.float32
    assert shuttle_data.labels.sum() == 3511
    assert set(np.unique(shuttle_data.labels)) == {0, 1}
    assert not shuttle_data.held_out.any()


def test_digits_are_what_scikit_learn_loads(digits_data):
    """Pins that reading the file gives what the package's own loader gives."""
    images, labels = load_digits_of_sklearn(return_X_y=True)
    np.testing.assert_array_equal(digits_data.values.reshape(-1, 64), images)
    np.testing.assert_array_equal(digits_data.labels, labels)


def test_streams_are_the_trainers_streams(shuttle_data, digits_data):
    """Pins that fleet and trainer, which may not import each other, part the data alike."""
    np.testing.assert_array_equal(shuttle_data.stream, np.arange(49097)[of_the_trainer.SHUTTLE_STREAM])
    np.testing.assert_array_equal(digits_data.stream, of_the_trainer.digits_stream())


def test_no_streamed_row_was_trained_on(shuttle_data, digits_data):
    """Pins that the first release has seen nothing of what the fleet reads."""
    assert len(digits_data.stream) == 1097
    assert not set(digits_data.stream) & set(of_the_trainer.digits_initial())
    assert shuttle_data.stream.min() == of_the_trainer.SHUTTLE_SELECT.stop


def test_two_streamed_digits_in_five_are_held_out(digits_data):
    """Pins the share, and that only streamed images count towards it."""
    assert digits_data.held_out[digits_data.stream].sum() == 439 == digits_data.held_out.sum()


def test_held_out_digits_hold_every_class(digits_data):
    """Pins that accuracy on held-out images says something about each digit."""
    assert np.bincount(digits_data.labels[digits_data.held_out], minlength=10).min() >= 30


def test_arrays_cannot_be_written_to(digits_data):
    """Pins that one device cannot change what the next one reads."""
    with pytest.raises(ValueError, match="read-only"):
        digits_data.values[0] = 0


def test_loading_imports_neither_package():
    """Pins that a simulated device starts without the seconds that river and scikit-learn take to import."""
    code = (
        "import sys; from simulator.datasets import load_digits, load_shuttle; load_digits(); load_shuttle();"
        "assert not {'river', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["no_such_package", "river"])
def test_missing_file_names_the_extra(package):
    """Pins what an operator reads who has not installed the data."""
    with pytest.raises(ConfigError, match="install the `simulator` extra"):
        datasets._load_table(package, "datasets/none.csv.gz", (1, 1), skip_rows=0)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"1,2\n3,x\n"), gzip.compress(b"1,2\n"), gzip.compress(b"1,2\n3,nan\n")]
)
def test_broken_file_is_refused(content, tmp_path, monkeypatch):
    """Pins that a damaged or changed data file stops the run instead of bending it."""
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "data.csv.gz").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.csv\.gz"):
        datasets._load_table("broken_package", "data.csv.gz", (2, 2), skip_rows=0)
