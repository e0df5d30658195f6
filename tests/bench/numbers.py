#!/usr/bin/env python3
"""What this machine does with the demo model, in a few lines. Not a test: nothing is asserted.

    E2E_BUILD_DIR=build python3 tests/bench/numbers.py [flags of baton serve]
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from cluster import Cluster, gather  # noqa: E402


def cpu_s(pid):
    """CPU time of all threads; schedstat counts nanoseconds, /proc/PID/stat only hundredths."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text().split()[0]) for t in tasks) / 1e9


def body(i, n):
    return {"inputs": f"[gMASK]<sop><|user|>Tell me a story about a fox. {i}<|assistant|></think>",
            "parameters": {"max_new_tokens": n, "do_sample": False, "ignore_eos": True}}


def run(cluster, streams, n):
    firsts, events = {}, [0]

    def on_event(a):
        firsts.setdefault(id(a), time.monotonic())
        events[0] += 1

    began, router = time.monotonic(), cpu_s(cluster.pid("router"))
    answers = gather(cluster, "/generate_stream", [body(i, n) for i in range(streams)], on_event=on_event,
                     timeout=300)
    spent = time.monotonic() - began
    bad = [a.error for a in answers if a.error]
    tokens = sum(len(a.ids) for a in answers)
    ttft = sorted(t - began for t in firsts.values())
    print(f"{streams:4} streams  {tokens / spent:9.0f} tokens/s  TTFT median {ttft[len(ttft) // 2] * 1e3:.1f} ms"
          f"  router {(cpu_s(cluster.pid('router')) - router) / events[0] * 1e6:.1f} ms CPU per 1000 events"
          + (f"  {len(bad)} errors: {bad[0]}" if bad else ""))


def main():
    began = time.monotonic()
    with Cluster(*(sys.argv[1:] or ["--mtp-step", "2"])) as c:
        print(f"start to ready  {time.monotonic() - began:.2f} s")
        for streams, n in ((1, 200), (1, 400), (32, 200)):
            run(c, streams, n)
        for name in c.names:
            print(f"{name:12} {c.rss_kb(name) / 1024:7.1f} MiB resident")


if __name__ == "__main__":
    main()
