import pytest

from simulator.datasets import DataSet, load_digits, load_shuttle


@pytest.fixture(scope="session")
def shuttle_data() -> DataSet:
    return load_shuttle()


@pytest.fixture(scope="session")
def digits_data() -> DataSet:
    return load_digits()
