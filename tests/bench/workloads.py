#!/usr/bin/env python3
"""The four workloads, one after the other, on a cluster of two prefill and two decode workers of its own, and one
report that compares them.

    python3 tests/bench/workloads.py mock --data sharegpt.jsonl --out DIR    full size, 11 minutes
    python3 tests/bench/workloads.py cpu  --data sharegpt.jsonl --out DIR    the demo model, 40 requests each

DIR gets WORKLOAD.json of each, all.html, and table.md, which is also printed. The data: see README.md beside this
file. With `mock`, steps take what they would on an H100 (as far as HACKING.md says) and tokens are made up: what is
measured is the router, the protocol, scheduling and handoff, not kernels. With `cpu` the demo model computes, and the
figures are those of this machine. --only NAME... runs fewer; E2E_BUILD_DIR names another build.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from cluster import BATON, Cluster  # noqa: E402
from router_limits import cpu_s  # noqa: E402

WORKLOADS = ("burst", "high-conc", "moderate", "steady")
KINDS = {
    # Exactly the file's lengths, whatever the tokeniser; drafts are right as often as assumed elsewhere.
    "mock": {"serve": ["--device", "mock", "--mtp-step", 2, "--mtp-simulate-acceptance", 0.7,
                       "--running-max-req-size", 512],
             "bench": ["--prompts", "ids", "--vocab-size", 2900],
             "of": dict.fromkeys(WORKLOADS, [])},
    "cpu": {"serve": ["--device", "cpu", "--threads", 1, "--mtp-step", 2],
            "bench": ["--prompts", "text", "--num-prompts", 40, "--max-total-tokens", 700],
            "of": {"burst": [], "high-conc": ["--max-concurrency", 10], "moderate": ["--request-rate", 1],
                   "steady": ["--request-rate", 0.5]}},
}
COLUMNS = [("completed", "answered", "{:.0f}"), ("failed", "failed", "{:.0f}"), ("duration", "s", "{:.1f}"),
           ("output_throughput", "output tokens/s", "{:,.0f}"), ("p50_ttft_ms", "TTFT p50 ms", "{:,.0f}"),
           ("p99_ttft_ms", "p99", "{:,.0f}"), ("p50_tpot_ms", "TPOT p50 ms", "{:.1f}"), ("p99_tpot_ms", "p99", "{:.1f}"),
           ("p50_e2el_ms", "E2E p50 ms", "{:,.0f}"), ("p99_e2el_ms", "p99", "{:,.0f}")]


def table(rows):
    lines = ["| workload | " + " | ".join(c[1] for c in COLUMNS) + " | router's CPU |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, s, used in rows:
        lines.append(f"| {name} | " + " | ".join(f.format(s[k]) for k, _, f in COLUMNS) +
                     f" | {used / s['duration'] * 100:.0f} % of a core |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=KINDS)
    p.add_argument("--data", required=True)
    p.add_argument("--out", required=True, type=pathlib.Path)
    p.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    args, more = p.parse_known_args()  # the rest is for baton bench
    kind = KINDS[args.kind]
    args.out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    with Cluster(*kind["serve"], prefill=2, decode=2) as c:
        for name in args.only:
            file = args.out / f"{name}.json"
            before = cpu_s(c.pid("router"))
            r = subprocess.run([str(a) for a in (BATON, "bench", "--url", c.url, "--workload", name, "--data", args.data,
                                                 "--label", f"{name}, {args.kind}", "--json", file, *kind["bench"], *kind["of"][name],
                                                 *more)], stdout=sys.stderr)
            failed += r.returncode
            if r.returncode < 2:
                rows.append((name, json.loads(file.read_text())["summary"], cpu_s(c.pid("router")) - before))
    subprocess.run([str(a) for a in (BATON, "bench", "report", *[args.out / f"{n}.json" for n, _, _ in rows], "--html",
                                     args.out / "all.html")], check=True)
    (args.out / "table.md").write_text(table(rows))
    print(table(rows))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
