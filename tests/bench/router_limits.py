#!/usr/bin/env python3
"""What the router can carry, as a table. Not a test: nothing is asserted.

    E2E_BUILD_DIR=build python3 tests/bench/router_limits.py [--quick]

The real router, protocol and workers; only what a GPU computes is made up (`--device mock`). Figures of the
router are its CPU time (the kernel's part for its sockets included) per token, which a busy machine
hardly changes: tokens/s on one core are the inverse. Rates and times of the clock are only worth something on an
idle machine with a core for the generator.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from cluster import BATON, Cluster, wait  # noqa: E402

STEP_MS = 40


def cpu_s(pid):
    """CPU time of all threads; schedstat counts nanoseconds."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text().split()[0]) for t in tasks) / 1e9


def flat_costs(step_ms):
    """Steps of one length for any batch: all streams of a worker go in step, the hardest case for a router."""
    return {"decode_ms": [[1, step_ms]], "verify_row_ms": [[1, 0]], "draft_ms": [[1, 1]],
            "prefill_tokens_per_s": 2e6, "prefill_chunk_ms": 5}


def mock_cluster(directory, costs, *flags, **kw):
    if costs:
        file = pathlib.Path(directory) / "costs.json"
        file.write_text(json.dumps(costs))
        flags += ("--mock-costs", file)
    return Cluster("--device", "mock", *flags, **kw).ready()


def load(cluster, directory, *flags):
    """(summary, requests, the router's CPU seconds)"""
    out = pathlib.Path(directory) / "run.json"
    before = cpu_s(cluster.pid("router"))
    subprocess.run([str(a) for a in (BATON, "bench", "--url", cluster.url, "--progress", "off", "--json", out, *flags)],
                   check=True, stdout=subprocess.DEVNULL)
    used = cpu_s(cluster.pid("router")) - before
    run = json.loads(out.read_text())
    return run["summary"], run["requests"], used


def quantile(values, p):
    return sorted(values)[min(int(len(values) * p / 100), len(values) - 1)]


def behind_first_ms(requests, step_ms):
    """How long after the first event of its step each event came, while all streams are decoded together; a step
    begins after half a step of silence."""
    times = [[r["sent_us"] + e for e in r["event_us"]] for r in requests]
    begin, end = max(t[2] for t in times), min(t[-2] for t in times)
    result, first, last = [], None, begin
    for t in sorted(t for stream in times for t in stream if begin < t < end):
        if t - last > step_ms * 500:
            first = t
        if first:
            result.append((t - first) / 1e3)
        last = t
    return result


def throughput(directory, streams, tokens):
    print(f"\n{streams} streams at once, 2P+2D, an event a token\n")
    print("| endpoint | tokens/s here | router's CPU a token | tokens/s on one core | failed |\n|---|---|---|---|---|")
    with mock_cluster(directory, flat_costs(STEP_MS), "--running-max-req-size", 1024, prefill=2, decode=2) as c:
        for endpoint in ("completions", "chat", "generate"):
            s, _, used = load(c, directory, "--endpoint", endpoint, "--num-prompts", streams, "--input-len", 64,
                              "--output-len", tokens)
            per_token = used / s["total_output_tokens"]
            print(f"| {endpoint} | {s['output_throughput']:.0f} | {per_token * 1e6:.2f} µs | {1 / per_token:.0f} |"
                  f" {s['failed']} |")


def pace(directory, requests):
    print("\nAt the pace of an H100 each, 2P+2D, drafts of 2 tokens, 70 % of them right\n")
    with mock_cluster(directory, None, "--running-max-req-size", 512, "--mtp-step", 2, "--mtp-simulate-acceptance", 0.7,
                      prefill=2, decode=2) as c:
        s, _, used = load(c, directory, "--workload", "burst", "--num-prompts", requests)
    print(f"burst of {requests}: {s['output_throughput']:.0f} tokens/s (best second {s['max_output_tokens_per_s']:.0f}), "
          f"TTFT p50 {s['p50_ttft_ms']:.0f} ms, TPOT p50 {s['p50_tpot_ms']:.1f} ms, router {used / s['duration'] * 100:.0f} % of a core, {s['failed']} failed")


def latency(directory, tokens):
    print("\nAdded latency: a step's tokens leave one after the other, so the last one waits for all others\n")
    print("| streams in a step | CPU of 99 % of a step's events | clock: event behind its step's first, p99 |"
          "\n|---|---|---|")
    for streams in (64, 256, 512):
        with mock_cluster(directory, flat_costs(STEP_MS), "--running-max-req-size", streams) as c:
            s, requests, used = load(c, directory, "--num-prompts", streams, "--input-len", 64, "--output-len", tokens)
        per_step_ms = used / s["total_output_tokens"] * streams * 0.99 * 1e3
        print(f"| {streams} | {per_step_ms:.2f} ms | {quantile(behind_first_ms(requests, STEP_MS), 99):.2f} ms |")


def answered(port):
    """A connection that has had an answer and stays open."""
    s = socket.create_connection(("127.0.0.1", port))
    s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    if not s.recv(4096).startswith(b"HTTP/1.1 200"):
        raise SystemExit("the router does not answer /health")
    return s


def idle_memory(connections):
    """Some connections come first: they use up memory that the router freed after its start."""
    print("\nIdle connections, memory of the router's process\n")
    print("| connections | before any request | after one request each |\n|---|---|---|")
    row = []
    for use in (socket.create_connection, None):
        with Cluster("--device", "mock").ready() as c:
            held, rss = [], []
            for n in (connections * 3 // 10, connections):
                fds = c.fds()
                held += [use(("127.0.0.1", c.port)) if use else answered(c.port) for _ in range(n)]
                wait(lambda: c.fds() >= fds + n, 20, "all connections are accepted")
                rss.append(c.rss_kb("router"))
            row.append((rss[1] - rss[0]) * 1024 / connections)
            for s in held:
                s.close()
    print(f"| {connections} | {row[0]:.0f} bytes each | {row[1]:.0f} bytes each |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    part = 10 if parser.parse_args().quick else 1
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    with tempfile.TemporaryDirectory() as directory:
        throughput(directory, 2000 // part, 300 // part)
        pace(directory, 2000 // part)
        latency(directory, 200 // part)
        idle_memory(10000 // part)


if __name__ == "__main__":
    main()
