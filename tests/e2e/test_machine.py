"""tests/device/machine.py on mock devices: what one calls on a machine with GPUs, PREFIX and all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from cluster import BUILD, ROOT, SLOWER, wait

DEVICE = ROOT / "tests" / "device"
sys.path.insert(0, str(DEVICE))
import machine  # noqa: E402


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    to = tmp_path_factory.mktemp("prefix")
    subprocess.run([DEVICE / "pack", BUILD, to], check=True, timeout=60 * SLOWER)
    return to


def run_machine(prefix, out, *flags):
    return subprocess.Popen([sys.executable, DEVICE / "machine.py", prefix, out, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def made_up_gpus(directory, n, mib, monkeypatch):
    script(directory / "nvidia-smi", f"echo {mib}\n" * n)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_two_gpus(prefix, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"decode_ms": [[1, 1]], "verify_row_ms": [[1, 0]], "draft_ms": [[1, 0.1]],
                                 "prefill_chunk_ms": 1}))
    p = run_machine(prefix, tmp_path, "--pretend", 2, "--budget", 30 * SLOWER, "--workloads", "high-conc,steady",
              "--mock-costs", costs)
    said = p.communicate(timeout=60 * SLOWER)[0]
    assert p.returncode == 0, said
    s = summary(tmp_path)
    assert s["topology"] == "gpu-1p1d" and not s["failed"] and s["seconds"] < 40 * SLOWER
    assert [(r["workload"], r["mtp"]) for r in s["runs"]] == [
        ("high-conc", "off"), ("steady", "off"), ("high-conc", "on"), ("steady", "on")]
    assert all(r["completed"] == r["num_prompts"] >= machine.FEWEST for r in s["runs"])
    assert set(s["warm_up_tokens_per_s"]) == {"off", "on"} and min(s["warm_up_tokens_per_s"].values()) > 0
    table = (tmp_path / "summary.md").read_text()
    assert table in said and "| high-conc | on |" in table and "6728" in table
    assert "steady, MTP on" in (tmp_path / "report.html").read_text()
    drafts = [float(re.search(r"^vllm:spec_decode_num_drafts_total(?:\{.*\})? (\S+)$",
                              (tmp_path / f"metrics-mtp-{mtp}.txt").read_text(), re.M)[1]) for mtp in ("off", "on")]
    assert drafts[0] == 0 and drafts[1] > 0


def test_the_warm_up_tells_the_rate(prefix, tmp_path, monkeypatch, start):
    """64 streams, each with a token every 20 ms; and nothing of it is left behind."""
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"decode_ms": [[1, 20]], "prefill_chunk_ms": 1, "prefill_tokens_per_s": 1e6}))
    c = start("--device", "mock", "--mock-costs", costs, "--running-max-req-size", 64)
    monkeypatch.setattr(sys, "argv", ["machine.py", str(prefix), str(tmp_path / "out"), "--pretend", "1"])
    run = machine.Run(machine.arguments(), prefix)
    note = run.warm_up(c, "off", 3)
    assert 0.6 * 3200 < run.tokens_per_s < 1.1 * 3200, note
    assert run.warm_up_rates == {"off": run.tokens_per_s} and not c.not_idle()
    assert machine.n_requests("high-conc", 60, run.tokens_per_s, 194) > 590  # 463 by the guess without it


def test_a_step_that_fails(prefix, tmp_path, monkeypatch):
    """The cluster cannot start: the exit code says so, and the other steps are tried. NCCL's figures are kept.
    Flags that the script does not know are baton serve's."""
    made_up_gpus(tmp_path, 2, 143771, monkeypatch)
    broken = tmp_path / "prefix"
    shutil.copytree(prefix, broken)
    (broken / "decode_worker" / "baton-decode").unlink()
    row = {"ctas": 4, "pages": 1, "median_us": 30, "worst_us": 40, "gb_s": 100, "both_gb_s": 190}
    figures = {"gpus": 2, "mode": "two ranks", "transfers": [row, {**row, "pages": 64}], "killed": []}
    script(broken / "nccl_bench", f"echo CTAs; echo '{json.dumps(figures)}'; echo 0 failed")
    p = run_machine(broken, tmp_path / "out", "--budget", 30, "--workloads", "steady", "--device", "mock")
    said = p.communicate(timeout=40 * SLOWER)[0]
    assert p.returncode == 1, said
    s = summary(tmp_path / "out")
    assert {x["name"]: x["outcome"] for x in s["steps"]} == {
        "preflight": "failed", "NCCL": "ok", "start, MTP off": "failed", "start, MTP on": "failed"}, said
    assert s["nccl"] == figures and "64 pages 100 GB/s one way" in said and s["topology"] == "gpu-1p1d"


def test_stopped_in_the_middle(prefix, tmp_path):
    p = run_machine(prefix, tmp_path, "--pretend", 4, "--budget", 300, "--workloads", "steady")
    wait(lambda: "--workload steady" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else False,
         20 + machine.WARM_UP_S, "a workload runs")
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=40 * SLOWER)[0]
    assert p.returncode == 1, said
    s = summary(tmp_path)
    assert s["failed"] and [x["outcome"] for x in s["steps"]] == ["ok", "ok", "ok", "failed"]
    left = [d for d in os.listdir("/proc") if d.isdigit() and str(prefix) in command_line(d)]
    assert not left, [command_line(d) for d in left]


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as f:
            return f.read()
    except OSError:
        return ""


@pytest.mark.parametrize("gpus, mib, name", [(1, 81559, "one-gpu"), (1, 143771, "one-h200"), (2, 81559, "gpu-1p1d"),
                                             (3, 143771, "gpu-1p1d"), (4, 81559, "gpu-2p2d"), (8, 81559, "gpu-2p2d")])
def test_topologies(gpus, mib, name, tmp_path, monkeypatch):
    made_up_gpus(tmp_path, gpus, mib, monkeypatch)
    assert machine.find_gpus() == (gpus, mib)
    file, n_each = machine.topology_for(gpus, mib)
    topology = json.loads(file.read_text())
    assert file.stem == name and len(topology["prefill"]) == len(topology["decode"]) == n_each


@pytest.mark.parametrize("real_rate", [800, 3000, 12000, 40000])
@pytest.mark.parametrize("warm_up", [0.7, 1, 1.5])
def test_the_budget_holds(warm_up, real_rate):
    """Whatever the machine makes, and the warm-up says of it: workloads, clusters and the steps before them fit nine
    minutes, and a fast machine is asked all 2000 requests."""
    left, asked = 540 - 60, {}
    jobs = [(mtp, w) for mtp in ("off", "on") for w in machine.WORKLOADS]
    while jobs:
        (mtp, workload), per_s = jobs[0], machine.WORKLOADS[jobs[0][1]][1]
        if mtp not in [m for m, _ in asked]:
            left -= machine.CLUSTER_S + machine.WARM_UP_S
            rate = real_rate * warm_up
        n = asked[jobs[0]] = machine.n_requests(workload, machine.share(left, jobs), rate, machine.MEAN_OUTPUT)
        left -= machine.TAIL_S + n / per_s if per_s else n * machine.MEAN_OUTPUT / real_rate
        rate = rate if per_s else real_rate
        jobs = jobs[1:]
    assert left > -1, (left, asked)
    assert asked["off", "steady"] == 200 and asked["on", "moderate"] == 400 or real_rate < 3000
    assert asked["off", "burst"] == asked["on", "burst"] == asked["on", "high-conc"] == 2000 or real_rate < 12000
