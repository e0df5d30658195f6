"""`baton` itself: flags, topologies, supervision."""

import asyncio
import json
import signal
import socket
import subprocess

import pytest

from cluster import BATON, BUILD, DEMO_MODEL, ROOT, SLOWER, stream, wait


def baton(*args, **kw):
    return subprocess.run([str(a) for a in (BATON, *args)], capture_output=True, text=True, timeout=30,
                          cwd=ROOT, **kw)


@pytest.mark.parametrize("args, names", [
    (["--bogus", "1"], "bogus"),
    (["--mtp-steps", "2"], "--mtp-steps"),
    (["--mtp-step", "9"], "--mtp-step is 9"),
    (["--max-queued", "none"], "--max-queued is 'none'"),
    (["--mem_fraction=2"], "--mem_fraction is 2"),
    (["--tp", "2"], "tp"),
    (["--port"], "port"),
    (["word"], "word"),
    (["--name", "x"], "name"),
    (["--topology", "/nonexistent.json"], "/nonexistent.json"),
    (["--topology", "deploy/topologies/2p2d.json", "--decode", "3"], "--decode"),
    (["--run-dir", "/proc/nope"], "/proc/nope"),
    (["--run-dir", "/dev/null"], "/dev/null"),
    (["--ready-file", "/nonexistent/url"], "/nonexistent/url"),
    (["--pin", "tight"], "pin"),
    (["--host", "no such host"], "host"),
])
def test_wrong_flags(args, names):
    r = baton("serve", *args)
    assert r.returncode == 2
    assert r.stdout == "" and r.stderr.count("\n") == 1 and names in r.stderr, r.stderr


@pytest.mark.parametrize("topology, names", [
    ({"decode": [{}]}, "prefill"),
    ({"prefill": [{}], "decode": []}, "decode"),
    ({"prefill": [{}], "decode": [{"max_queued": 3}]}, "max_queued"),
    ({"prefill": [{"mtp_step": [1]}], "decode": [{}]}, "mtp_step"),
    ({"prefill": [{}], "decode": [{}, {"mtp_step": 99}]}, "decode-1: mtp_step is 99"),
    ({"prefill": [{}], "decode": [{}], "all": {"device": 3}}, "all: device is '3'"),
    ({"prefill": [{}], "decode": [{}], "workers": 3}, "workers"),
    ([], "object"),
])
def test_wrong_topology(tmp_path, topology, names):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(topology))
    r = baton("serve", "--topology", file)
    assert r.returncode == 2 and names in r.stderr and str(file) in r.stderr, r.stderr


def test_help_and_version():
    for args in (["help"], ["serve", "--help"], ["version"], ["--version"]):
        r = baton(*args)
        assert r.returncode == 0 and r.stdout and not r.stderr
    assert baton().returncode == 2
    assert baton("nonsense").returncode == 2


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "deploy" / "topologies").glob("*.json")))
def test_topologies(start, file):
    path = ROOT / "deploy" / "topologies" / file
    topology = json.loads(path.read_text())
    if "cuda" in path.read_text():
        pytest.skip("needs a GPU")
    c = start(topology=path, prefill=len(topology["prefill"]), decode=len(topology["decode"]))
    assert set(c.pids()) == {"launcher", *c.names}
    assert c.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}})[0] == 200


def test_config_file(start, tmp_path):
    """One file for all processes; a flag wins over it."""
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"max_queued": 77, "mtp_step": 1, "served_model_name": "from-file"}))
    c = start("--config", file, "--mtp-step", 3)
    assert c.get("/v1/models")[2]["data"][0]["id"] == "from-file"
    cmdline = open(f"/proc/{c.pid('decode-0')}/cmdline").read()
    assert "--mtp_step=3" in cmdline and "max_queued" not in cmdline


@pytest.mark.parametrize("setting, names", [
    ({"port": "x"}, "port is 'x'"),
    ({"max_queued": -1}, "max_queued is -1"),
    ({"prot": 1}, "'prot'"),
])
def test_wrong_config_file(tmp_path, setting, names):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(setting))
    r = baton("serve", "--config", file)
    assert r.returncode == 2 and names in r.stderr and str(file) in r.stderr, r.stderr


def test_admin(start):
    c = start()
    r = baton("admin", c.run_dir / "decode-0.admin", "accounting")
    assert r.returncode == 0 and json.loads(r.stdout)["pages"]["total"] > 0
    for name in c.names:
        r = baton("admin", c.run_dir / f"{name}.admin", "nonsense")
        assert r.returncode == 1 and json.loads(r.stdout)["error"]
    r = baton("admin", c.run_dir / "nothing.admin", "accounting")
    assert r.returncode == 1 and r.stderr.count("\n") == 1


def test_tells_the_service_manager(start, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(str(tmp_path / "notify"))
        s.settimeout(20 * SLOWER)
        c = start(env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert s.recv(64) == b"READY=1"
        c.broken = True  # it is to end
        assert c.stop() == 0
        assert s.recv(64) == b"STOPPING=1"


def test_launcher_killed(start):
    """kill -9 of the launcher takes everything with it: no orphan keeps a port or a GPU, and no answer waits
    for workers that nobody will start again."""
    c = start("--device", "mock")
    c.broken = True
    pids = {k: v for k, v in c.pids().items() if k != "launcher"}

    def kill(answer):
        if len(answer.events) == 2 and c.process.poll() is None:
            c.process.send_signal(signal.SIGKILL)
            c.process.wait()

    body = {"inputs": "a", "parameters": {"max_new_tokens": 2000, "ignore_eos": True}}
    answer = asyncio.run(stream(c, "/generate_stream", body, on_event=kill, timeout=10))
    assert answer.error and not answer.whole, answer.error
    assert "shutting down" in answer.error, answer.error

    def gone(pid):
        try:
            return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait(lambda: all(gone(p) for p in pids.values()), 5, "all children are gone", c.log)


def test_two_on_one_port(start):
    first = start()
    second = start("--port", first.port, wait=False)
    assert second.process.wait(10 * SLOWER) != 0
    assert str(first.port) in second.log()
    assert first.get("/ready")[0] == 200


def test_programs_missing(tmp_path):
    r = baton("serve", env={"BATON_BIN_DIR": str(tmp_path)})
    assert r.returncode == 2 and "baton-router" in r.stderr


def test_programs_elsewhere(start):
    c = start(env={"BATON_BIN_DIR": str(BUILD)})
    assert c.get("/health")[0] == 200


def test_signal_to_a_child_that_does_not_run_its_program_yet(tmp_path):
    """A router that ends at once makes the launcher signal workers just forked; a signal that a child gets
    before its exec is not one to the launcher."""
    for name, script in (("router", "exit 2"), ("prefill", "exec sleep 60"), ("decode", "exec sleep 60")):
        program = tmp_path / f"baton-{name}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    for _ in range(20):
        r = baton("serve", "--port", "0", "--prefill", "30", "--decode", "30", env={"BATON_BIN_DIR": str(tmp_path)})
        assert r.returncode == 2 and "asked twice" not in r.stderr, r.stderr


@pytest.mark.parametrize("program, args, says", [
    ("router/baton-router", ["--max-queued", "x"], "--max-queued is 'x'"),
    ("router/baton-router", ["--model-dir", "/nonexistent"], "/nonexistent"),
    ("prefill_worker/baton-prefill", ["--model-dir", "/nonexistent"], "/nonexistent"),
    ("prefill_worker/baton-prefill", ["--model-dir", DEMO_MODEL, "--router-endpoint", "tcp://192.0.2.1:7000"],
     "--curve-key-file"),
    ("decode_worker/baton-decode", ["--model-dir", DEMO_MODEL, "--peer-endpoint", "tcp://192.0.2.1:7001"],
     "--curve-key-file"),
    ("decode_worker/baton-decode", ["--model-dir", DEMO_MODEL, "--device", "mock", "--mock-costs", "/nonexistent"],
     "--mock-costs: /nonexistent"),
])
def test_started_in_vain(program, args, says):
    """Code 2 tells systemd and others not to try again; what is wrong is said before weights are read."""
    r = subprocess.run([str(a) for a in (BUILD / program, *args)], capture_output=True, text=True, timeout=30)
    assert r.returncode == 2 and says in r.stderr and " load " not in r.stderr, r.stderr
