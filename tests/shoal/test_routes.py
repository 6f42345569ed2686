"""The topic table."""

from pathlib import Path

import pytest

from shoal.errors import PayloadError
from shoal.routes import MAX_SLASHES, ROUTES, Route, parse_topic, topic, topic_filter

pytestmark = pytest.mark.device

_SEGMENTS = {"site": "plant-a", "node": "cam_01", "service": "ingest", "sha256": "ab" * 32}
_STATE = {
    *(Route.PRESENCE, Route.STATE, Route.CLOUD_PRESENCE, Route.CLOUD_STATE),
    *(Route.TRUST_BUNDLE, Route.TRUST_TIMESTAMP, Route.BLOB),
}
_DOCS = Path(__file__).parent.parent.parent / "docs" / "topics.md"


@pytest.mark.parametrize("route", Route)
def test_topic_and_its_address_are_one(route):
    """What is built is what is read back."""
    address = parse_topic(topic(route, **_SEGMENTS))
    assert address.route is route
    for name in ("site", "node", "service", "sha256"):
        assert getattr(address, name) in ("", _SEGMENTS[name])


@pytest.mark.parametrize("route", Route)
def test_every_broker_takes_the_topic(route):
    """AWS IoT Core allows seven slashes."""
    assert topic(route, **_SEGMENTS).count("/") <= MAX_SLASHES


@pytest.mark.parametrize("route", Route)
def test_state_is_retained_and_nothing_else_is(route):
    """A retained command would be obeyed by every node that ever connects."""
    assert ROUTES[route].retain == (route in _STATE)
    assert ROUTES[route].qos == 1


@pytest.mark.parametrize("route", Route)
def test_every_route_is_in_the_documentation(route):
    """The page that shows every topic shows this one, as it is."""
    page = _DOCS.read_text()
    assert f"| `{route.value}` | `{ROUTES[route].template}` | {'yes' if ROUTES[route].retain else 'n'}" in page


@pytest.mark.parametrize("bad", ["", "Plant", "a/b", "+", "#", "-a", "a" * 64, "ä", "a b"])
def test_what_is_no_id_makes_no_topic(bad):
    """Wildcards and other surprises never reach a topic."""
    with pytest.raises(PayloadError, match=r"topic\.site"):
        topic(Route.INFER, site=bad, node="cam")


@pytest.mark.parametrize(
    "text", ["", "shoal/v1", "shoal/v2/up/a/b/infer", "shoal/v1/up/a/b/infer/x", "shoal/v1/blob/AB"]
)
def test_foreign_topics_are_refused(text):
    """Nothing is guessed."""
    with pytest.raises(PayloadError):
        parse_topic(text)


def test_filters_leave_open_what_is_not_given():
    """A gateway's shared filter names its site and group, and any node."""
    assert topic_filter(Route.INFER, site="a", group="gw-1") == "$share/gw-1/shoal/v1/up/a/+/infer"
    assert topic_filter(Route.REPLY) == "shoal/v1/down/+/+/reply"
