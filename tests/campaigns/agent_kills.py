"""SIGKILLs a real agent again and again while readings flow through it to a real gateway, and then closes the books.

    make agent-kills ARGS="--kills 200 --seed 1"

One pipe outlives all agents: what a killed one did not read, the next one does. Each reading carries its line's number, so
the wire tells which line became which of the device's numbers. An agent is killed while it starts, after so many questions, or
upon an answer, before it can have written that down. The last one is left in peace until it owes nothing. Needs Mosquitto.

The last line is JSON. `holes` and `counted_twice` must be 0. `lost_before_accept` is what kills took before a commit:
with `--hold-s` it includes what was asked already. `sent_again` counts rows each time that they were asked again, `answered_twice`
those that the gateway answered again, because a kill had taken the first answer.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from gateway_requests import WIDTH, write_model

from device_agent.outbox_report import read_outbox
from fleet_console.broker import BrokerKind, start_broker
from shoal.delivery.ledger import Books, Row, reconcile
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.v1 import inference_pb2 as pb

SITE, NODE, MODEL = "plant", "dev-1", "m"
PATIENCE_S = 60.0
FEED_S = 0.01
# How long an agent takes to start, more or less: kills of this kind come within it.
START_S = 1.5
SETTLED = ("answered", "quarantined", "dropped.full", "dropped.displaced")


class Witness:
    """Sees every question, every answer and what the device says of itself; says nothing."""

    def __init__(self, url, loop):
        self.lines = {}
        self.epochs = set()
        self.answers = Counter()
        self.refused = set()
        self.counters = {}
        self.online = set()
        self.asked_rows = 0
        self.answered_rows = 0
        self.on_answer = lambda: None
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(SITE, "witness", "device"))
        for route, handler in (
            (Route.INFER, self.on_infer),
            (Route.REPLY, self.on_reply),
            (Route.STATE, self.on_state),
            (Route.PRESENCE, self.on_presence),
        ):
            self.link.subscribe(route, handler, site=SITE)
        self.link.attach(loop)

    def on_infer(self, delivery):
        self.epochs.add(delivery.message.epoch)
        for row in delivery.message.rows:
            line = int(row.reading.scalars.values[0])
            assert self.lines.setdefault(row.reading.seq, line) == line, "one number, two readings"
            self.asked_rows += 1

    def on_reply(self, delivery):
        for row in delivery.message.rows:
            if row.status == pb.STATUS_OK:
                self.answers[row.seq] += 1
                self.answered_rows += 1
            elif row.status == pb.STATUS_INVALID_ARGUMENT:
                self.refused.add(row.seq)
        self.on_answer()

    def on_state(self, delivery):
        if delivery.address.node == NODE:
            self.counters = dict(delivery.message.counters)

    def on_presence(self, delivery):
        if delivery.message is not None and delivery.message.online:
            self.online.add(delivery.address.node)


class Pipe:
    """Lines for whichever agent reads them; full, it waits."""

    def __init__(self, per_feed):
        self.source, self.sink = os.pipe()
        os.set_blocking(self.sink, False)
        self.written = 0
        self.per_feed = per_feed

    def feed(self, _now=0.0):
        for _ in range(self.per_feed):
            line = ",".join([str(self.written), *["0.5"] * (WIDTH - 1)]) + "\n"
            try:
                os.write(self.sink, line.encode())  # shorter than PIPE_BUF: whole, or not at all
            except BlockingIOError:
                return
            self.written += 1

    def close(self):
        os.close(self.source)
        os.close(self.sink)


class Campaign:
    def __init__(self, options, folder, broker, closing):
        self.rng = random.Random(options.seed)
        self.folder = folder
        self.loop = Loop()
        closing.callback(self.loop.close)
        self.witness = Witness(broker.url, self.loop)
        closing.callback(self.witness.link.close)
        self.pipe = Pipe(max(1, round(options.rate * FEED_S)))
        closing.callback(self.pipe.close)
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'site = "{SITE}"\nnode = "{NODE}"\nmodel = "{MODEL}"\ndata_dir = "{folder}/data"\n'
            f'trusted_root = "{folder}/root.json"\nmax_per_minute = 1000000000\nretry_after_s = 2.0\n'
            f"state_interval_s = 0.2\noutbox_hold_s = {options.hold_s}\n"
            f'[broker]\nurl = "{broker.url}"\n[source]\nkind = "stdin"\n'
        )
        (folder / "root.json").write_text("{}")
        write_model(folder / f"{MODEL}.onnx")
        self.closing = closing
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        arguments = ["--model", f"{folder}/{MODEL}.onnx", "--broker", broker.url, "--site", SITE, "--name", "gw"]
        self.spawn(["edge_gateway", *arguments, "--metrics-address", ""], "gateway.log")

    def spawn(self, arguments, log, stdin=subprocess.DEVNULL):
        with (self.folder / log).open("ab") as file:
            command = [sys.executable, "-m", *arguments]
            child = subprocess.Popen(command, stdin=stdin, stdout=file, stderr=file, env=self.environment)
        self.closing.callback(child.wait)
        self.closing.callback(child.kill)
        return child

    def agent(self):
        return self.spawn(["device_agent", "run", "--config", str(self.config)], "agent.log", self.pipe.source)

    def wait(self, is_so, child=None):
        """Serve until it is so, or the child has ended, or patience has."""
        deadline = self.loop.clock() + PATIENCE_S
        late = self.loop.call_at(deadline, lambda _: None)  # the loop looks again by then
        self.loop.run(until=lambda: is_so() or self.loop.clock() >= deadline or (child and child.poll() is not None))
        late.cancel()
        return is_so()

    def until(self, is_so, what, child=None):
        if not self.wait(is_so, child):
            raise SystemExit(f"{what}: not so\n{(self.folder / 'agent.log').read_text()[-2000:]}")

    def run(self, kills):
        witness = self.witness
        self.until(lambda: "gw" in witness.online and witness.link.is_subscribed, "the gateway is there")
        feeding = self.loop.call_every(FEED_S, self.pipe.feed)
        for _ in range(kills):
            self.kill_one()
        feeding.cancel()
        last = self.agent()
        self.pipe.feed()
        # Where it never is, the books say what is missing.
        self.wait(self.is_settled, last)
        last.send_signal(signal.SIGTERM)
        if last.wait(PATIENCE_S) != 0:
            raise SystemExit(f"the last agent ended with {last.returncode}")

    def kill_one(self):
        witness, way = self.witness, self.rng.choice(["start", "asked", "answered"])
        is_time = []
        timer = self.loop.call_at(
            self.loop.clock() + (self.rng.uniform(0.0, START_S) if way == "start" else PATIENCE_S),
            lambda _: is_time.append(way),
        )
        child = self.agent()
        asked = witness.asked_rows + self.rng.randrange(1, 300)
        answered = witness.answered_rows + self.rng.randrange(1, 300)
        if way == "asked":
            self.until(lambda: witness.asked_rows >= asked, f"{asked} rows were asked", child)
        elif way == "answered":
            # Within the reply's own callback: no later than the agent hears it.
            witness.on_answer = lambda: child.kill() if witness.answered_rows >= answered else None
            self.until(lambda: witness.answered_rows >= answered, f"{answered} rows were answered")
            witness.on_answer = lambda: None
        else:
            self.until(lambda: is_time, "the time has come", child)
        timer.cancel()
        child.kill()
        if child.wait() != -signal.SIGKILL:
            raise SystemExit(f"an agent ended by itself with {child.returncode}")

    def is_settled(self):
        counters = self.witness.counters
        accepted = counters.get("accepted", 0)
        is_last_seen = self.pipe.written - 1 in self.witness.lines.values()
        return is_last_seen and 0 < accepted == sum(counters.get(name, 0) for name in SETTLED)

    def books(self, hold_s):
        """What the wire, the pipe and the device's own file say of each other."""
        witness = self.witness
        counters = read_outbox(self.folder / "data" / "outbox.sqlite").counters
        seen = set(witness.lines.values())
        unseen = [line for line in range(self.pipe.written) if line not in seen]
        # The device numbered these too, and nobody but the dead knows how.
        rows = witness.lines | {-1 - line: line for line in unseen}
        produced = {Row(NODE, seq): str(line) for seq, line in rows.items()}
        answered = {Row(NODE, seq) for seq in witness.answers}
        refused = {Row(NODE, seq) for seq in witness.refused}
        account = reconcile(
            Books(
                produced=produced,
                wanted=produced.keys(),
                counters={NODE: counters},
                asked={Row(NODE, seq) for seq in witness.lines},
                answered=answered,
                refused=refused,
                promised=set(),
                stored=[],
                expected={(NODE, str(line)) for line in range(self.pipe.written)},
            )
        )
        broken = [] if hold_s else sorted(witness.lines.keys() - witness.answers.keys() - witness.refused)
        holes = account.named_holes + [f"{seq} was asked, and so accepted, and never answered" for seq in broken[:20]]
        if len(witness.epochs) != 1:
            holes.append(f"{len(witness.epochs)} epochs")
        gaps = [len(list(run)) for _, run in groupby(enumerate(unseen), lambda pair: pair[1] - pair[0])]
        return {
            "readings": account.produced,
            "accepted": account.accepted,
            "answered": account.answered,
            "sent_again": witness.asked_rows - len(witness.lines),
            "answered_twice": sum(times > 1 for times in witness.answers.values()),
            "counted_twice": max(0, account.answered - len(answered)),
            "lost_before_accept": account.lost_before_accept,
            "longest_loss": max(gaps, default=0),
            "in_flight": account.in_flight,
            "holes": account.holes + len(broken) + (len(witness.epochs) != 1),
            "named_holes": holes,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=200.0, help="readings a second")
    parser.add_argument("--hold-s", type=float, default=0.0, help="the agent's outbox_hold_s")
    options = parser.parse_args()
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        broker = closing.enter_context(start_broker(folder, BrokerKind.MOSQUITTO))
        campaign = Campaign(options, folder, broker, closing)
        campaign.run(options.kills)
        result = {"kills": options.kills, "hold_s": options.hold_s, **campaign.books(options.hold_s)}
    print(json.dumps(result))
    return bool(result["holes"] or result["counted_twice"] or result["in_flight"])


if __name__ == "__main__":
    sys.exit(main())
