"""A feed that remembers, on a real loop."""

import time

import pytest

from shoal.loop import Loop

PATIENCE_S = 30.0


class MemoryFeed:
    """What a source feeds, in the order in which it came."""

    def __init__(self):
        self.loop = Loop()
        self.readings = []
        self.refused = []
        self.heard = []

    def take(self, reading):
        self.readings.append(reading)
        self.heard.append(reading.reference)

    def refuse(self, error):
        self.refused.append(str(error))
        self.heard.append("refused")

    def gap(self):
        self.heard.append("gap")

    def end(self):
        self.heard.append("end")

    @property
    def is_ended(self):
        return "end" in self.heard

    @property
    def references(self):
        return [reading.reference for reading in self.readings]

    @property
    def values(self):
        return [reading.values.tolist() for reading in self.readings]

    def serve(self, source, until):
        """Run a source until it is so; fail where it never is."""
        source.start(self)
        try:
            self.until(until)
        finally:
            source.close()

    def until(self, is_so):
        deadline = time.monotonic() + PATIENCE_S
        late = self.loop.call_at(deadline, lambda _: None)  # the loop looks again by then
        self.loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
        late.cancel()
        assert is_so(), self.heard


@pytest.fixture
def feed():
    made = MemoryFeed()
    yield made
    made.loop.close()
