"""The contract as a table: as whom a message may come from and reach; checked with passwords and with certificates."""

from fleet_console.roles import Kind, Node
from shoal.routes import CLOUD_SITE, Route, topic, topic_filter

SITE = "plant"
GROUP = "gw-0123456789ab"
DIGEST = "0" * 64
NODES = [
    Node(Kind.DEVICE, "cam-1", SITE),
    Node(Kind.DEVICE, "cam-2", SITE),
    Node(Kind.GATEWAY, "gw-1", SITE, GROUP),
    Node(Kind.GATEWAY, "gw-2", SITE, devices=["cam-2"]),
    Node(Kind.INGEST, "ingest", group="ingest"),
    Node(Kind.PUBLISHER, "publisher"),
    Node(Kind.TRAINER, "trainer"),
    Node(Kind.CONTROLLER, "controller"),
    Node(Kind.LABELLER, "labeller"),
    Node(Kind.OPERATOR, "alice"),
    Node(Kind.VIEWER, "vera"),
    Node(Kind.PROVISIONER, "paul"),
]
BY_NAME = {node.name: node for node in NODES}

# The contract, as whom a message may come from and reach. "own" is the node itself, "peer" the device cam-2 of the
# same site, "away" a node of another site, "cloud" the service ingest as a node, "any" where the topic names no node.
MAY_WRITE = {
    "cam-1": "presence/own state/own infer/own result/own",
    "gw-1": "presence/own state/own sample/own result/own reply/own reply/peer",
    "gw-2": "presence/own state/own sample/own result/own reply/peer",
    "ingest": "cloud_presence/own cloud_state/own result/own ack/own ack/peer ack/away",
    "publisher": "cloud_presence/own cloud_state/own result/own trust_bundle/any trust_timestamp/any blob/any",
    "trainer": "cloud_presence/own cloud_state/own result/own",
    "controller": "cloud_presence/own cloud_state/own result/own command/own command/peer command/away command/cloud",
    "labeller": "cloud_presence/own cloud_state/own result/own command/cloud",
    "vera": "cloud_presence/own cloud_state/own result/own",
    "paul": "cloud_presence/own cloud_state/own result/own "
    + " ".join(f"{name}/{who}" for name in ("presence", "state") for who in ("own", "peer", "away", "cloud")),
    "alice": "cloud_presence/own cloud_state/own result/own command/own command/peer command/away command/cloud",
}
MODELS = "trust_bundle/any trust_timestamp/any blob/any"
MAY_READ = {
    "cam-1": f"reply/own command/own {MODELS}",
    "gw-1": f"ack/own command/own infer/own infer/peer {MODELS}",
    "gw-2": f"ack/own command/own infer/peer {MODELS}",
    "ingest": "command/own sample/own sample/peer sample/away state/own state/peer state/away",
    "publisher": "command/own",
    "trainer": "command/own",
    "controller": "command/own "
    + " ".join(f"{name}/{who}" for name in ("presence", "state", "result") for who in ("own", "peer", "away", "cloud"))
    + " cloud_presence/own cloud_presence/peer cloud_state/own cloud_state/peer",
    "paul": "command/own",
    "labeller": "command/own sample/own sample/peer sample/away sample/cloud result/cloud",
}


def topics_of(node):
    """Every kind of message, to and from every kind of other: label by topic."""
    nodes = {
        "own": {"site": node.site, "node": node.name},
        "peer": {"site": SITE, "node": "cam-2"},
        "away": {"site": "elsewhere", "node": "cam-9"},
        "cloud": {"site": CLOUD_SITE, "node": "ingest"},
    }
    services = {"own": {"service": node.name}, "peer": {"service": "observer"}}
    found = {}
    for route in Route:
        pattern = topic_filter(route)
        places = nodes if "+/+" in pattern else services if "cloud" in route.value else {"any": {"sha256": DIGEST}}
        for who, segments in places.items():
            found.setdefault(topic(route, **segments), f"{route.value}/{who}")
    return found
