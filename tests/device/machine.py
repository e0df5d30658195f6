#!/usr/bin/env python3
"""What Baton does on this machine's GPUs, in one command and within nine minutes: preflight, NCCL, and the
four workloads at full size (dummy weights) without MTP and with it.

  machine.py PREFIX OUT [--gpus N] [--budget 540] [--first demo,faults] [flags of baton serve]

PREFIX is what tests/device/pack made; ShareGPT's prompts where PREFIX/sharegpt.jsonl is, else synthetic ones.
Four GPUs run two prefill and two decode workers, two or three one of each, one GPU both roles with shared
weights and KV pools for its memory: deploy/topologies. A cluster is first kept busy for some seconds, which
tells its rate. Workloads are cut to the budget: those with a rate to 40 s, the others to the requests that their
share of the time holds at that rate, all 2000 where it can.

OUT gets summary.md, summary.json, report.html and log, written anew after every step: a run that is killed
leaves what it had. The exit code is 1 if a step failed. --first: demo, the demo model's goldens; faults,
10,000 handoffs (--handoffs) and workers killed in the middle of others; both over NCCL where there are two
GPUs. --pretend N acts as if there were N GPUs: mock devices at an H100's pace, for testing this script.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from prefix import ROOT, flash_dir, sharegpt, use

# Requests, requests a second (None: as fast as they are answered) and what LightLLM publishes for four H200:
# output tokens/s, mean TTFT and mean E2E in ms.
WORKLOADS = {
    "high-conc": (2000, None, (6728, 1099, 11240)),
    "burst": (2000, None, (6442, 11476, 27719)),
    "moderate": (2000, 10, (1798, 196, 5746)),
    "steady": (2000, 5, (917, 154, 2797)),
}
RATE_S = 40            # of a workload with a rate
TAIL_S = 10            # the answers that are still under way when the last request was sent
LEAST_S = 15           # of a workload without one
FEWEST = 8             # requests
CLUSTER_S = 45         # to start and to stop one
ONE_H200_MIB = 135000  # what its pools and the weights want
WARM_UP_S = 8          # at the concurrency of high-conc
TOKENS_PER_S_GPU = 1500  # until something has been measured: rather too few than too many
MEAN_OUTPUT = 194      # tokens of an answer where baton bench draws the lengths
ACCEPTANCE = 0.7       # simulated: dummy weights cannot draft


class Cut(Exception):
    """A signal: what there is gets written, and that was it."""


def find_gpus():
    """The GPUs that CUDA would show us: how many, and the MiB of the smallest."""
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
                                capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    mib = [int(line) for line in listed.split("\n") if line.strip().isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = len(mib) if visible is None else min(len(mib), len([x for x in visible.split(",") if x.strip()]))
    return n, min(mib, default=0)


def topology_for(gpus, mib):
    """(file, number of prefill and of decode workers)"""
    one = "one-h200" if mib >= ONE_H200_MIB else "one-gpu"
    name, n = ("gpu-2p2d", 2) if gpus >= 4 else ("gpu-1p1d", 1) if gpus >= 2 else (one, 1)
    return ROOT / "deploy" / "topologies" / f"{name}.json", n


def n_requests(workload, seconds, tokens_per_s, mean_output):
    """How many requests of a workload take about so many seconds."""
    most, rate, _ = WORKLOADS[workload]
    if rate:
        return max(FEWEST, min(most, int(rate * min(RATE_S, seconds - TAIL_S))))
    return max(FEWEST, min(most, int(seconds * tokens_per_s / mean_output)))


def share(left_s, jobs):
    """Seconds for the first of jobs, [(MTP, workload)]: those with a rate take what they need as long as
    LEAST_S are left to each of the others, which share the rest. Of very little all get the same."""
    n_clusters = len({mtp for mtp, _ in jobs[1:]} - {jobs[0][0]})
    left_s -= n_clusters * min(CLUSTER_S + WARM_UP_S, left_s / 4)
    least_s = min(LEAST_S, left_s / len(jobs))
    n_rated = sum(WORKLOADS[w][1] is not None for _, w in jobs)
    n_other = len(jobs) - n_rated
    rated_s = min(RATE_S + TAIL_S, (left_s - least_s * n_other) / n_rated) if n_rated else 0
    return rated_s if WORKLOADS[jobs[0][1]][1] else (left_s - rated_s * n_rated) / n_other


class Run:
    def __init__(self, a, prefix):
        self.a, self.prefix, self.out = a, prefix, pathlib.Path(a.out)
        self.begun = time.monotonic()
        n, mib = (a.pretend, 0) if a.pretend else find_gpus()
        self.gpus = min(n or a.gpus, a.gpus or n)
        self.topology, self.n_each = topology_for(self.gpus, mib)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log").write_text("")
        self.log_file = open(self.out / "log", "a", buffering=1)
        self.stopped = self.may_stop = False
        self.nccl_figures = None
        self.steps, self.runs, self.warm_up_rates = [], [], {}
        self.tokens_per_s = self.gpus * TOKENS_PER_S_GPU
        self.model, self.data = flash_dir(), sharegpt(prefix)
        self.mean_output = MEAN_OUTPUT
        if self.data:
            lines = (json.loads(x) for x in open(self.data[1]))
            lengths = [x["output_tokens"] for x in lines if "output_tokens" in x]
            self.mean_output = sum(lengths) / len(lengths)

    @property
    def failed(self):
        return self.stopped or any(s["outcome"] == "failed" for s in self.steps)

    def left_s(self):
        return self.a.budget - (time.monotonic() - self.begun)

    def say(self, text):
        print(text, flush=True)
        self.log_file.write(text + "\n")

    # -- signals: between steps and in long waits, never while a process starts or ends

    def on_signal(self, *_):
        self.stopped = True
        if self.may_stop:
            raise Cut

    @contextlib.contextmanager
    def waiting(self):
        self.may_stop = True
        try:
            if self.stopped:
                raise Cut
            yield
        finally:
            self.may_stop = False

    # -- steps

    def step(self, name, limit_s, do, least_s=0):
        """do(limit_s) -> a few words, raises if it failed. Once the budget is spent, nothing begins that needs
        more than least_s."""
        begun, limit_s = time.monotonic(), max(least_s, min(limit_s, self.left_s()))
        entry = {"name": name, "outcome": "ok"}
        self.steps.append(entry)
        try:
            with self.waiting():
                pass
            entry["note"] = do(limit_s) if limit_s > 1 else None
            if limit_s <= 1:
                entry.update(outcome="failed", note="no time was left for it")
        except Cut:
            entry.update(outcome="failed", note="stopped by a signal")
            raise
        except Exception as e:  # the next step still tells something
            entry.update(outcome="failed", note=f"{type(e).__name__}: {e}".splitlines()[0][:300])
            self.log_file.write(f"{e}\n")
        finally:
            entry["seconds"] = round(time.monotonic() - begun, 1)
            self.say(f"{name}: {entry['outcome']} in {entry['seconds']} s{': ' if entry.get('note') else ''}"
                     f"{entry.get('note') or ''}")
            self.write()

    def program(self, command, limit_s, name=None, **env):
        """Runs a program; returns its output, which goes to the log, or to OUT/NAME."""
        command = [str(x) for x in command]
        self.log_file.write("$ " + " ".join(command) + "\n")
        path = self.out / (name or "log")
        with open(path, "w" if name else "a") as to:
            begin = to.tell()
            p = subprocess.Popen(command, stdout=to, stderr=to, stdin=subprocess.DEVNULL, cwd=ROOT,
                                 env={**os.environ, **env}, start_new_session=True)
            try:
                with self.waiting():
                    code = p.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"cut off after {limit_s:.0f} s") from None
            finally:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
                    p.wait()
        with open(path, errors="replace") as text:
            text.seek(begin)
            output = text.read()
        if code:
            raise RuntimeError(f"exit code {code}: {output.strip().splitlines()[-1] if output.strip() else ''}")
        return output

    def flags(self):
        device = ["--device", "mock"] if self.a.pretend else []
        return ["--model-dir", self.model, "--load-format", "dummy", "--served-model-name", "flash", *device]

    def mtp_flags(self, mtp):
        step = self.a.mtp_step if mtp == "on" else 0
        return ["--mtp-step", step, *(["--mtp-simulate-acceptance", ACCEPTANCE] if step else [])]

    def preflight(self, limit_s):
        output = self.program([self.prefix / "deploy" / "baton", "preflight", "--topology", self.topology,
                               "--port", "0", *self.flags(), *self.a.flags], limit_s, "preflight.txt")
        return output.strip().splitlines()[-1]

    def nccl(self, limit_s):
        output = self.program([self.prefix / "nccl_bench", "quick"], limit_s, "nccl.txt")
        self.nccl_figures = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
        few, many = self.nccl_figures["transfers"][0], self.nccl_figures["transfers"][-1]
        return (f"{self.nccl_figures['mode']}, {few['pages']} page in {few['median_us']} us, {many['pages']} pages "
                f"{many['gb_s']:.0f} GB/s one way, {many['both_gb_s']:.0f} both ways together")

    def serve(self, verb, limit_s):
        """A verb of serve.py, from the first GPU to the second."""
        devices = ["cpu"] if self.a.pretend else [f"cuda:{i}" for i in range(min(self.gpus, 2))]
        transport = ["--kv-transport", "nccl"] if len(devices) == 2 else []
        self.program([sys.executable, ROOT / "tests" / "device" / "serve.py", verb, self.prefix, *devices,
                      *transport], limit_s, f"{verb}.txt", HANDOFFS=str(self.a.handoffs))
        return f"{verb}.txt"

    def bench(self, cluster, mtp, workload, n, limit_s):
        name = f"{workload}-mtp-{mtp}"
        path = self.out / f"{name}.json"
        path.unlink(missing_ok=True)
        error = None
        try:
            self.program([self.prefix / "baton-bench", "--url", cluster.url, "--workload", workload,
                          "--num-prompts", n, "--num-warmups", min(64, n), "--vocab-size", "2900", "--json", path,
                          "--label", f"{workload}, MTP {mtp}", "--progress", "off", *self.data], limit_s)
        except RuntimeError as e:
            error = e
        if not path.exists():
            raise error
        s = json.loads(path.read_text())["summary"]  # there are figures even if some requests failed
        self.runs.append({"workload": workload, "mtp": mtp, **s})
        if not WORKLOADS[workload][1] and s["output_throughput"]:
            self.tokens_per_s = s["output_throughput"]
        files = [self.out / f"{r['workload']}-mtp-{r['mtp']}.json" for r in self.runs]
        self.program([self.prefix / "baton-bench", "report", *files, "--html", self.out / "report.html"], 30)
        if error:
            raise RuntimeError(f"{s['failed'] + s['unfinished']} of {n} requests failed: {s['failures']}")
        return f"{n} requests, {s['output_throughput']:.0f} output tokens/s, TTFT {s['mean_ttft_ms']:.0f} ms"

    def warm_up(self, cluster, mtp, limit_s):
        """As many in flight as high-conc has; prompts of its own, which no prefix cache shall know later. The rate
        counts from the first token on, so that the first prompts' way to it is no part of it."""
        def tokens():
            found = re.search(r"^vllm:generation_tokens_total(?:\{.*\})? (\S+)$", cluster.get("/metrics")[2], re.M)
            return float(found[1]) if found else 0

        begun, first_s, n = time.monotonic(), None, 0
        command = [str(x) for x in (self.prefix / "baton-bench", "--url", cluster.url, "--workload", "high-conc",
                                    "--vocab-size", "2900", "--seed", "1", "--progress", "off")]
        self.log_file.write("$ " + " ".join(command) + "\n")
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log_file, stdin=subprocess.DEVNULL,
                             cwd=ROOT, start_new_session=True)
        try:
            before, spent_s = tokens(), 0
            with self.waiting():
                while p.poll() is None and spent_s < limit_s:
                    time.sleep(0.1)
                    spent_s, n = time.monotonic() - begun, tokens() - before
                    first_s = first_s or (n and spent_s)
        finally:
            p.terminate()
            p.wait()
        cluster.wait_idle(10)  # what the load left behind is cancelled
        if not n:
            raise RuntimeError(f"no token within {spent_s:.0f} s")
        self.tokens_per_s = self.warm_up_rates[mtp] = round(n / max(spent_s - first_s, 0.1), 1)
        return f"{self.tokens_per_s:.0f} output tokens/s"

    def idle(self, cluster, mtp, limit_s):
        (self.out / f"metrics-mtp-{mtp}.txt").write_text(cluster.get("/metrics")[2])
        cluster.wait_idle(limit_s)
        return "no page and no request is left"

    def cluster(self, mtp, jobs):
        """The workloads of one cluster. jobs: all that are still to come, these first."""
        from cluster import Cluster
        made = []

        def start(limit_s):
            made.append(Cluster(*self.flags(), *self.mtp_flags(mtp), *self.a.flags, topology=self.topology,
                                prefill=self.n_each, decode=self.n_each))
            with self.waiting():
                made[0].ready(limit_s)
            return self.topology.stem

        try:
            self.step(f"start, MTP {mtp}", 120, start)
            if self.steps[-1]["outcome"] != "ok":
                return
            self.step(f"warm-up, MTP {mtp}", min(WARM_UP_S, max(2, self.left_s() / 20)),
                      lambda limit_s: self.warm_up(made[0], mtp, limit_s))
            while jobs and jobs[0][0] == mtp:
                workload = jobs[0][1]
                seconds = share(self.left_s(), jobs)
                n = n_requests(workload, seconds, self.tokens_per_s, self.mean_output)
                self.step(f"{workload}, MTP {mtp}", 3 * max(seconds, 10) + 20,
                          lambda limit_s: self.bench(made[0], mtp, workload, n, limit_s))
                jobs = jobs[1:]
            self.step(f"idle again, MTP {mtp}", 10, lambda limit_s: self.idle(made[0], mtp, limit_s), least_s=10)
        finally:
            if made:
                made[0].process.terminate()
                try:
                    made[0].process.wait(20)
                except subprocess.TimeoutExpired:
                    made[0].process.kill()
                (self.out / f"cluster-mtp-{mtp}.log").write_text(made[0].log())
                made[0].close()

    def all(self):
        if not self.gpus:
            raise SystemExit("machine.py: no GPU found (nvidia-smi); --pretend N does without")
        self.say(f"{self.gpus} GPUs{' (pretended)' if self.a.pretend else ''}, {self.topology.stem}, "
                 f"{'ShareGPT' if self.data else 'synthetic prompts'}, {self.a.budget:.0f} s")
        self.step("preflight", 30, self.preflight)
        if not self.a.pretend:
            self.step("NCCL", 90, self.nccl)
        for verb in self.a.first:
            self.step(verb, 180, lambda limit_s: self.serve(verb, limit_s))
        jobs = [(mtp, w) for mtp in ("off", "on") for w in self.a.workloads]
        self.cluster("off", jobs)
        self.cluster("on", jobs[len(self.a.workloads):])

    # -- what is left behind

    def table(self):
        lines = ["| workload | MTP | requests | failed | output tok/s | TTFT ms, mean | p99 | ITL ms, mean | "
                 "TPOT ms, mean | E2E ms, mean |", "|---|---|---|---|---|---|---|---|---|---|"]
        for workload in self.a.workloads:
            for r in (r for r in self.runs if r["workload"] == workload):
                lines.append(f"| {workload} | {r['mtp']} | {r['num_prompts']} | {r['failed'] + r['unfinished']} | "
                             f"{r['output_throughput']:.0f} | {r['mean_ttft_ms']:.0f} | {r['p99_ttft_ms']:.0f} | "
                             f"{r['mean_itl_ms']:.2f} | {r['mean_tpot_ms']:.2f} | {r['mean_e2el_ms']:.0f} |")
            n, _, (tokens, ttft, e2e) = WORKLOADS[workload]
            lines.append(f"| {workload} | LightLLM, 4 H200 | {n} | | {tokens} | {ttft} | | | | {e2e} |")
        return "\n".join(lines)

    def write(self):
        """summary.md and summary.json; each is whole at any time."""
        steps = "\n".join(f"| {s['name']} | {s['outcome']} | {s.get('seconds', '')} | {s.get('note') or ''} |"
                          for s in self.steps)
        head = (f"{self.gpus} GPUs{' (pretended: mock devices)' if self.a.pretend else ''}, {self.topology.stem}, "
                f"{'ShareGPT' if self.data else 'synthetic prompts'}, MTP: {self.a.mtp_step} drafts, simulated "
                f"acceptance {ACCEPTANCE}")
        texts = {
            "summary.md": f"{head}\n\n{self.table()}\n\n| step | | s | |\n|---|---|---|---|\n{steps}\n",
            "summary.json": json.dumps({
                "gpus": self.gpus, "pretended": bool(self.a.pretend), "topology": self.topology.stem,
                "data": "sharegpt" if self.data else "synthetic", "failed": self.failed,
                "seconds": round(time.monotonic() - self.begun, 1), "steps": self.steps,
                "nccl": self.nccl_figures, "warm_up_tokens_per_s": self.warm_up_rates, "runs": self.runs}, indent=1) + "\n"}
        for name, text in texts.items():
            (self.out / f".{name}").write_text(text)
            os.replace(self.out / f".{name}", self.out / name)


def arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known):
        def parse(text):
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is none of {', '.join(known)}")
            return text.split(",")
        return parse

    ap.add_argument("prefix")
    ap.add_argument("out")
    ap.add_argument("--gpus", type=int, default=0, help="use so many; default: all")
    ap.add_argument("--pretend", type=int, default=0, metavar="N")
    ap.add_argument("--budget", type=float, default=540, metavar="S")
    ap.add_argument("--mtp-step", type=int, default=2, help="drafts where MTP is on")
    ap.add_argument("--first", type=names(["demo", "faults"]), default=[])
    ap.add_argument("--handoffs", type=int, default=10000)
    ap.add_argument("--workloads", type=names(WORKLOADS), default=list(WORKLOADS))
    a, flags = ap.parse_known_args()
    a.flags = flags
    return a


def main():
    a = arguments()
    run = Run(a, use(a.prefix))
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, run.on_signal)
    with contextlib.suppress(Cut):
        run.all()
    run.write()
    print((run.out / "summary.md").read_text())
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
