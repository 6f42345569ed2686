import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from simulator.pipe import Pipe, TokenBucket, Weather

CAPACITY = 4000
STEPS = st.lists(st.tuples(st.floats(0, 2), st.integers(0, 5000)), max_size=40)


@given(rate=st.floats(0.5, 1e6), burst=st.integers(1, 5000), steps=STEPS)
def test_bucket_never_exceeds_its_rate_in_any_span(rate, burst, steps):
    """Pins the definition: at most the burst and rate times the length, in each span of the run."""
    bucket, now, spent = TokenBucket(rate, burst), 0.0, []
    for passed_s, wanted in steps:
        now += passed_s
        count = int(min(wanted, bucket.allowance(now)))
        bucket.spend(count, now)
        spent.append((now, count))
    for first, (begin, _) in enumerate(spent):
        total = 0
        for end, count in spent[first:]:
            total += count
            assert total <= burst + rate * (end - begin) + 1e-6 * total


@given(rate=st.floats(0.5, 1e7), burst=st.integers(1, 5000), spend=st.integers(0, 5000), late_s=st.floats(0, 1e6))
def test_bucket_opens_again_when_it_said(rate, burst, spend, late_s):
    """Pins that whoever sleeps until `next_at` neither starves nor spins."""
    bucket = TokenBucket(rate, burst)
    bucket.spend(min(spend, burst), late_s)
    if bucket.allowance(late_s) >= 1:
        return
    when = bucket.next_at(late_s)
    assert when > late_s
    assert bucket.allowance(when + 1e-6 * when) >= min(1, burst)


def test_bucket_refuses_more_than_it_holds():
    """Pins that overspending is a programming error, not a debt."""
    bucket = TokenBucket(100.0, 10)
    with pytest.raises(ValueError, match="11 bytes"):
        bucket.spend(11, 0.0)
    assert bucket.allowance(0.0) == 10


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TokenBucket(0, 1),
        lambda: TokenBucket(1, 0),
        lambda: Weather(latency_s=-1),
        lambda: Weather(latency_s=math.nan),
        lambda: Weather(rate_bytes_per_s=0),
        lambda: Weather(rate_bytes_per_s=math.inf),
    ],
)
def test_impossible_weather_is_refused(wrong):
    """Pins the ranges."""
    with pytest.raises(ValueError, match="expected"):
        wrong()


class PipeMachine(RuleBasedStateMachine):
    """Pushes, passes, waits and changes the weather in any order, against a plain record of what went in and out."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.weather = Weather()
        self.pipe = Pipe(self.weather, CAPACITY)
        self.earliest = []  # for each byte pushed, when it may leave
        self.pushed = bytearray()
        self.out = bytearray()
        self.is_ended = False

    @rule(data=st.binary(max_size=1500))
    def push(self, data):
        if len(data) > self.pipe.room_bytes:
            with pytest.raises(ValueError, match="room"):
                self.pipe.push(data, self.now)
            return
        self.pipe.push(data, self.now)
        self.pushed += data
        self.earliest += [self.now + self.weather.latency_s] * len(data)

    @rule(most=st.integers(1, 5000))
    def take(self, most):
        chunk = self.pipe.ready(self.now)
        if not chunk:
            return
        assert not self.weather.is_blocked
        count = min(most, len(chunk))
        begin = len(self.out)
        self.out += chunk[:count]
        self.pipe.passed(count, self.now)
        assert all(at <= self.now for at in self.earliest[begin : begin + count])

    @rule(passed_s=st.floats(0, 3))
    def wait(self, passed_s):
        self.now += passed_s

    @rule(latency_s=st.floats(0, 3), rate=st.one_of(st.none(), st.floats(100, 1e6)), is_blocked=st.booleans())
    def change_weather(self, latency_s, rate, is_blocked):
        self.weather = Weather(latency_s, rate, is_blocked)
        self.pipe.set_weather(self.weather)

    @precondition(lambda self: not self.is_ended and not self.weather.is_blocked)
    @rule()
    def end(self):
        self.pipe.end(self.now)
        self.is_ended = True

    @invariant()
    def order_size_and_end_hold(self):
        assert self.pushed.startswith(self.out)
        assert self.pipe.size_bytes == len(self.pushed) - len(self.out) <= CAPACITY
        if self.pipe.is_over(self.now):
            assert self.is_ended
            assert self.out == self.pushed
        if self.weather.is_blocked or self.is_ended:
            assert self.pipe.room_bytes == 0

    def teardown(self):
        """In fair weather everything comes out, by waking only when the pipe says so."""
        self.weather = Weather(rate_bytes_per_s=self.weather.rate_bytes_per_s)
        self.pipe.set_weather(self.weather)
        while (when := self.pipe.next_at(self.now)) is not None and not self.pipe.is_over(self.now):
            self.now = max(when, self.now)
            self.take(10**6)
        assert self.out == self.pushed
        assert self.pipe.is_over(self.now) == self.is_ended


PipeMachine.TestCase.settings = settings(deadline=None)
TestPipe = PipeMachine.TestCase


def drain(pipe, now):
    """Take all that ever comes and return [(time, bytes)], waking only when told to."""
    passed = []
    while (when := pipe.next_at(now)) is not None and not pipe.is_over(now):
        now = max(when, now)
        if chunk := pipe.ready(now):
            passed.append((now, len(chunk)))
            pipe.passed(len(chunk), now)
    return passed


def test_latency_delays_by_exactly_itself():
    """Pins the unit and that two pushes keep their distance."""
    pipe = Pipe(Weather(latency_s=0.5), CAPACITY)
    pipe.push(b"a", 10.0)
    pipe.push(b"b", 10.2)
    assert drain(pipe, 10.2) == [(10.5, 1), (10.7, 1)]


def test_shorter_latency_does_not_overtake():
    """Pins that bytes pushed after the weather cleared still come after those pushed before."""
    pipe = Pipe(Weather(latency_s=5.0), CAPACITY)
    pipe.push(b"a", 0.0)
    pipe.set_weather(Weather())
    pipe.push(b"b", 1.0)
    assert drain(pipe, 1.0) == [(5.0, 1), (5.0, 1)]


@given(rate=st.floats(50, 1e6))
def test_bandwidth_is_reached_and_not_exceeded(rate):
    """Pins that a steady stream gets its rate beyond the first burst: not more, and hardly less."""
    burst, beyond = max(1500, math.ceil(rate * 0.01)), math.ceil(rate / 4)
    pipe = Pipe(Weather(rate_bytes_per_s=rate), burst + beyond)
    pipe.push(b"x" * (burst + beyond), 0.0)
    passed = drain(pipe, 0.0)
    assert sum(count for _, count in passed) == burst + beyond
    assert beyond / rate - 1e-6 <= passed[-1][0] <= beyond / rate + 0.002


def test_repeated_weather_of_one_rate_grants_no_new_burst():
    """Pins that a partition that heals again and again is no way round the limit."""
    pipe = Pipe(Weather(rate_bytes_per_s=100), CAPACITY)
    pipe.push(b"x" * 3000, 0.0)
    pipe.passed(len(pipe.ready(0.0)), 0.0)
    for is_blocked in (True, False):
        pipe.set_weather(Weather(rate_bytes_per_s=100, is_blocked=is_blocked))
    assert len(pipe.ready(0.0)) == 0


def test_end_travels_like_bytes():
    """Pins that a FIN is delayed too, and waits behind a block."""
    pipe = Pipe(Weather(latency_s=1.0), CAPACITY)
    pipe.end(2.0)
    assert (pipe.is_over(2.9), pipe.next_at(2.0), pipe.is_over(3.0)) == (False, 3.0, True)
    pipe.set_weather(Weather(is_blocked=True))
    assert not pipe.is_over(3.0)
    assert pipe.next_at(3.0) is None


def test_block_holds_what_has_arrived():
    """Pins that bytes whose latency passes during a block come after it."""
    pipe = Pipe(Weather(latency_s=1.0), CAPACITY)
    pipe.push(b"abc", 0.0)
    pipe.set_weather(Weather(is_blocked=True))
    assert len(pipe.ready(5.0)) == 0
    assert pipe.room_bytes == 0
    pipe.set_weather(Weather())
    assert pipe.ready(5.0) == b"abc"
