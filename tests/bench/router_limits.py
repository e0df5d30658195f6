#!/usr/bin/env python3
"""What the router can carry, as a table. Not a test: nothing is asserted.

    E2E_BUILD_DIR=build python3 tests/bench/router_limits.py [--quick] [--only PART...] [--receiver-apart] [--realtime]
    [--send-threads N]

The real router, protocol and workers; only what a GPU computes is made up (`--device mock`). Figures of the
router are its CPU time (the kernel's part for its sockets included) per token, which a busy machine
hardly changes: tokens/s on one core are the inverse. Rates and times of the clock are only worth something on an
idle machine with a core for the generator.

On loopback the sender's core also does the receiver's part of TCP. --receiver-apart (root) puts the clients into a
network namespace of their own behind a pair of virtual network cards, whose receiving side threads of the kernel do on
the other cores, and keeps the router on the first core, its sending threads on the others: as with clients on another
machine. --realtime (root) lets nobody take a core away from the router, so that delays by the clock are its own even on
a busy machine. Where there are but two cores, the clients and their part of TCP wait while a sending thread works.
"""

import argparse
import array
import fcntl
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from cluster import BATON, Cluster, wait  # noqa: E402

STEP_MS = 40
ROUTER, CLIENT = "10.0.0.1", "10.0.0.2"


def cpu_s(pid):
    """CPU time of all threads; schedstat counts nanoseconds."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text().split()[0]) for t in tasks) / 1e9


def flat_costs(step_ms):
    """Steps of one length for any batch: all streams of a worker go in step, the hardest case for a router."""
    return {"decode_ms": [[1, step_ms]], "verify_row_ms": [[1, 0]], "draft_ms": [[1, 1]],
            "prefill_tokens_per_s": 2e6, "prefill_chunk_ms": 5}


options = argparse.Namespace(receiver_apart=False, realtime=False, send_threads=1)
other_cores = set(range(1, os.cpu_count()))
clients = None  # a process in the clients' network namespace


def settle(cluster):
    """Gives the router the core that the options promise it; its sending threads get the others."""
    for task in pathlib.Path(f"/proc/{cluster.pid('router')}/task").iterdir():
        if options.receiver_apart:
            sends = (task / "comm").read_text().startswith("send/")
            os.sched_setaffinity(int(task.name), other_cores if sends else {0})
        if options.realtime:
            os.sched_setscheduler(int(task.name), os.SCHED_FIFO, os.sched_param(1))
    return cluster


def mock_cluster(directory, costs, *flags, **kw):
    if costs:
        file = pathlib.Path(directory) / "costs.json"
        file.write_text(json.dumps(costs))
        flags += ("--mock-costs", file)
    host = ROUTER if clients else "127.0.0.1"
    c = Cluster("--host", host, "--device", "mock", "--send-threads", options.send_threads, *flags, **kw).ready()
    c.host = host
    return settle(c)


def bench(cluster, out, *flags):
    there = ("nsenter", "--target", clients.pid, "--net") if clients else ()
    return [str(a) for a in (*there, BATON, "bench", "--url", cluster.url, "--progress", "off", "--json", out, *flags)]


def load(cluster, directory, *flags):
    """(summary, requests, the router's CPU seconds)"""
    out = pathlib.Path(directory) / "run.json"
    before = cpu_s(cluster.pid("router"))
    subprocess.run(bench(cluster, out, *flags), check=True, stdout=subprocess.DEVNULL)
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


def delays_now(cluster):
    """{bound: events that took no longer}, and how many streams are decoded"""
    below, running = {}, 0
    for line in cluster.get("/metrics")[2].splitlines():
        if line.startswith("baton_event_delay_seconds_bucket"):
            below[float(line.split('le="')[1].split('"')[0])] = int(line.rsplit(" ", 1)[1])
        elif line.startswith("vllm:num_requests_running") and 'role="decode"' in line:
            running += float(line.rsplit(" ", 1)[1])
    return below, running


def delay_quantile(below, p):
    """ms, straight between two bounds"""
    rank, from_, before = below[float("inf")] * p / 100, 0, 0
    for bound, n in below.items():
        if n >= rank:
            return (from_ + (bound - from_) * (rank - before) / max(n - before, 1)) * 1e3
        from_, before = bound, n


def delays(directory, streams, tokens):
    """The router's own metric while all streams are decoded by four workers, each at its own pace."""
    print(f"\nDelay from a worker's message to each of its events being sent: {streams} streams, 2P+4D, steps not aligned\n")
    print("| | events/s | tokens/s | p50 | p90 | p99 | p99.9 | within 2 ms | router's CPU |\n|---|---|---|---|---|---|---|---|---|")
    for what, step_ms, flags in (("an event a token", 50, ()),
                                 ("drafts of 2, 70 % right", 108, ("--mtp-step", 2, "--mtp-simulate-acceptance", 0.7))):
        with mock_cluster(directory, flat_costs(step_ms), "--running-max-req-size", 512, *flags, prefill=2, decode=4) as c:
            load_it = subprocess.Popen(bench(c, pathlib.Path(directory) / "run.json", "--num-prompts", streams,
                                             "--input-len", 64, "--output-len", tokens), stdout=subprocess.DEVNULL)
            wait(lambda: delays_now(c)[1] == streams, 60, "all streams are decoded", c.log)
            before, began, used = delays_now(c)[0], time.monotonic(), cpu_s(c.pid("router"))
            made = c.get("/status")[2]["cluster"]["totals"]["generated_tokens"]
            while (now := delays_now(c))[1] == streams:
                below, ended, used_then = now[0], time.monotonic(), cpu_s(c.pid("router"))
                made_then = c.get("/status")[2]["cluster"]["totals"]["generated_tokens"]
                time.sleep(0.2)
            load_it.wait()
        below = {k: below[k] - before[k] for k in below}
        s, n = ended - began, below[float("inf")]
        quantiles = " | ".join(f"{delay_quantile(below, p):.2f} ms" for p in (50, 90, 99, 99.9))
        print(f"| {what} | {n / s:.0f} | {(made_then - made) / s:.0f} | {quantiles} | {below[.002] / n * 100:.1f} % |"
              f" {(used_then - used) / s * 100:.0f} % of a core, {(used_then - used) / n * 1e6:.2f} µs an event |")


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


def receive_in_threads(card):
    """Generic receive offload, where the other card sends plain packets, is what makes a virtual card poll, and
    polling is what a thread can do."""
    with socket.socket() as s:
        for setting in ((0x2c, 1), (0x1f, 0)):  # ETHTOOL_SGRO, ETHTOOL_STSO
            value = array.array("I", setting)
            fcntl.ioctl(s, 0x8946, struct.pack("16sP8x", card.encode(), value.buffer_info()[0]))  # SIOCETHTOOL
    subprocess.run(["ip", "link", "set", card, "up"], check=True)
    pathlib.Path(f"/sys/class/net/{card}/threaded").write_text("1")


def move_clients():
    """Returns a process in a network namespace that is joined to this one."""
    def run(*command):
        subprocess.run([str(a) for a in command], check=True)

    run("mount", "-t", "sysfs", "sysfs", "/sys")
    p = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait(lambda: os.readlink(f"/proc/{p.pid}/ns/net") != os.readlink("/proc/self/ns/net"), 5, "the clients' namespace")
    run("ip", "link", "add", "router", "type", "veth", "peer", "name", "client")
    for card in ("router", "client"):
        receive_in_threads(card)
    there = ("nsenter", "--target", p.pid, "--net")
    run("ip", "link", "set", "client", "netns", p.pid)
    for where, card, address in (((), "router", ROUTER), (there, "client", CLIENT)):
        run(*where, "ip", "address", "add", f"{address}/24", "dev", card)
        run(*where, "ip", "link", "set", card, "up")
        run(*where, "ip", "link", "set", "lo", "up")

    def threads():
        return [int(t.parent.name) for t in pathlib.Path("/proc").glob("[0-9]*/comm")
                if t.read_text().startswith(("napi/router", "napi/client"))]

    for pid in wait(lambda: len(threads()) >= 2 and threads(), 5, "the cards' threads"):
        os.sched_setaffinity(pid, other_cores)
    return p


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--receiver-apart", action="store_true")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--send-threads", type=int, default=1, help="the router's; on the other cores with --receiver-apart")
    parts = ("throughput", "pace", "latency", "delays", "idle")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.parse_args(namespace=options)
    if options.receiver_apart and "BATON_RECEIVER_APART" not in os.environ:
        os.environ["BATON_RECEIVER_APART"] = "1"
        os.execvp("unshare", ["unshare", "--net", "--mount", sys.executable, *sys.argv])
    if options.receiver_apart:
        global clients
        clients = move_clients()
    part = 10 if options.quick else 1
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"
          + (", clients' part of TCP on other cores" if options.receiver_apart else "")
          + (", router at real-time priority" if options.realtime else ""))
    with tempfile.TemporaryDirectory() as directory:
        for name, measure in {"throughput": lambda: throughput(directory, 2000 // part, 300 // part),
                              "pace": lambda: pace(directory, 2000 // part),
                              "latency": lambda: latency(directory, 200 // part),
                              "delays": lambda: delays(directory, 2000 // part, 300 // min(part, 3)),
                              "idle": lambda: idle_memory(10000 // part)}.items():
            if name in options.only:
                measure()


if __name__ == "__main__":
    main()
