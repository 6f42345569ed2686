"""What an outbox writes for each answered question: durable before it is sent, or held in memory while all goes well.

    make bench-outbox ARGS="--questions 6000 --rate 10"

The outbox is driven as the agent drives it (a tick each 0.1 s, numbers reserved by 256, answers after `--answer-s`), in
virtual time and under strace, which sees every byte that SQLite hands to the kernel and every flush. The last line is JSON.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from shoal.delivery.outbox import Hold, Item, Key, Outbox

_TICK_S = 0.1
_SEQ_BLOCK = 256
_WRITTEN = re.compile(r"(pwrite64|write|writev)\(\d+<.*outbox\.sqlite.*\) = (\d+)$")
_FLUSHED = re.compile(r"(fdatasync|fsync)\(\d+<.*outbox\.sqlite.*\) = 0$")


def drive(path, hold_s, questions, rate_hz, answer_s, payload_bytes):
    """Ask and be answered; the link is up all the time."""
    box = Outbox(path, hold=Hold(hold_s) if hold_s else None)
    epoch = box.epoch("dev")
    seqs, asked, open_ = iter(()), 0, []
    ticks = 0
    while asked < questions or open_:
        now = ticks * _TICK_S
        ticks += 1
        while asked < min(questions, now * rate_hz):
            seq = next(seqs, None)
            if seq is None:
                seqs = iter(box.reserve_seqs("dev", _SEQ_BLOCK))
                seq = next(seqs)
            box.count("dev", "produced")
            box.count("dev", "asked.no_model")
            assert box.put(Item(Key("dev", epoch, seq), "m", bytes(payload_bytes)), now)
            asked += 1
        while open_ and open_[0][0] <= now:
            assert box.settle(open_.pop(0)[1], "answered")
        box.commit_due(now, is_connected=True)
        open_ += [(now + answer_s, item.key) for item, _ in box.take(now, 32, 10.0)]
    box.close()


def measure(hold_s, options):
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        calls = "trace=pwrite64,write,writev,fdatasync,fsync"
        child = [sys.executable, __file__, "--child", str(Path(folder) / "outbox.sqlite"), "--hold-s", str(hold_s)]
        for name in ("questions", "rate", "answer_s", "payload_bytes"):
            child += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        subprocess.run(["strace", "-f", "-qq", "-y", "-o", trace, "-e", calls, *child], check=True)
        lines = trace.read_text().splitlines()
    written = sum(int(found[2]) for line in lines if (found := _WRITTEN.search(line)))
    flushes = sum(1 for line in lines if _FLUSHED.search(line))
    return {
        "hold_s": hold_s,
        "bytes_per_answer": round(written / options.questions, 1),
        "flushes_per_answer": round(flushes / options.questions, 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=10.0, help="asked a second")
    parser.add_argument("--answer-s", type=float, default=0.05)
    parser.add_argument("--payload-bytes", type=int, default=100)
    parser.add_argument("--hold-s", type=float, nargs="*", default=[0.0, 1.0, 5.0, 30.0])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        drive(
            options.child,
            options.hold_s[0],
            options.questions,
            options.rate,
            options.answer_s,
            options.payload_bytes,
        )
        return
    found = [measure(hold_s, options) for hold_s in options.hold_s]
    print(f"{'hold':>6} {'bytes an answer':>16} {'flushes an answer':>18}")
    for row in found:
        print(f"{row['hold_s']:>5}s {row['bytes_per_answer']:>16} {row['flushes_per_answer']:>18}")
    print(json.dumps({"questions": options.questions, "rate_hz": options.rate, "modes": found}))


if __name__ == "__main__":
    main()
