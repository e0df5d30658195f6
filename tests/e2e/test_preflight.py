"""`baton preflight` and the placing of GPU workers, on GPUs that tests/deploy/fake_nvml.c makes up."""

import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess

import pytest

from cluster import BATON, BUILD, DEMO_MODEL, ROOT

H100 = "90,80,79,0,0"
H200 = "90,140,139,0,0"
TOPOLOGIES = ROOT / "deploy" / "topologies"
LAUNCH = ROOT / "deploy" / "launch-4xh200"

def pci_device():
    """A device of this machine whose cores we may all use, to stand for a GPU: its bus id and their list."""
    for path in sorted(pathlib.Path("/sys/bus/pci/devices").glob("*/local_cpulist")):
        text = path.read_text().strip()
        spans = [[int(n) for n in part.split("-")] for part in text.split(",") if part]
        cpus = {cpu for span in spans for cpu in range(span[0], span[-1] + 1)}
        if cpus and cpus <= os.sched_getaffinity(0):
            return path.parent.name, text
    return None, ""


PCI_DEVICE, CPUS = pci_device()


@pytest.fixture
def machine(tmp_path):
    """machine(*flags, gpus=[..], ...) -> the report of preflight as [(verdict, what, text)]."""
    for module in ("baton_cuda.so", "baton_nccl.so"):  # any library will do
        shutil.copy(BUILD / "tests" / "deploy" / "libnvidia-ml.so.1", tmp_path / module)

    def run(*flags, gpus=None, env=None, command=(BATON, "preflight"), limits=(), port="0"):
        settings = {**os.environ, "BATON_MODULE_DIR": str(tmp_path), **(env or {})}
        if gpus is not None:
            settings["FAKE_GPUS"] = ";".join(gpus)
            settings["LD_LIBRARY_PATH"] = str(BUILD / "tests" / "deploy")

        def limit():
            for what, value in limits:
                resource.setrlimit(what, (value, value))

        r = subprocess.run([str(a) for a in (*command, *flags, "--port", port)], capture_output=True,
                           text=True, timeout=30, env=settings, preexec_fn=limit)
        text = r.stdout + r.stderr
        lines = [x for x in text.splitlines() if x.split()[:1] in (["ok"], ["warn"], ["FAIL"])]
        n = [sum(x.startswith(v) for x in lines) for v in ("ok", "warn", "FAIL")]
        assert "{} ok, {} warnings, {} failed\n".format(*n) in text, (text, r.stderr)
        assert r.returncode == (1 if n[2] else 0), r.stderr
        return [(x.split()[0], x.split()[1], x) for x in lines]

    return run


def bad(report):
    return {(verdict, what) for verdict, what, _ in report if verdict != "ok"} - {
        ("FAIL", "driver"),    # the device nodes, which are not made up
        ("warn", "cores"), ("warn", "memlock"), ("warn", "core")}


def text_of(report, what):
    return " ".join(text for _, name, text in report if name == what)


def test_cpu(machine):
    report = machine()
    assert not [x for x in report if x[0] == "FAIL"], report
    assert not [x for x in report if x[1] in ("driver", "cuda", "nvlink")]


@pytest.mark.parametrize("topology, n", [("one-gpu", 1), ("one-h200", 1), ("gpu-1p1d", 2), ("gpu-2p2d", 4),
                                         ("gpu-1p3d", 4)])
def test_topologies_fit(machine, topology, n):
    """Each shipped GPU topology passes on the machine that it is for and fails with a GPU less."""
    flags = ("--topology", TOPOLOGIES / f"{topology}.json")
    report = machine(*flags, gpus=[H100] * n)
    assert not bad(report), report
    assert len([x for x in report if x[1].startswith("cuda:")]) == n
    report = machine(*flags, gpus=[H100] * (n - 1))
    assert bad(report) == {("FAIL", f"cuda:{n - 1}")}, report


@pytest.mark.parametrize("gpu, says", [
    ("80,80,79,0,0", "capability 8.0"),
    ("90,80,79,0,1", "MIG"),
    ("90,80,79,2,0", "compute mode"),
    ("90,80,1,0,0", "1.0 of 80.0 GiB are free"),
])
def test_gpu_unfit(machine, gpu, says):
    report = machine("--topology", TOPOLOGIES / "gpu-1p1d.json", gpus=[H100, gpu])
    assert bad(report) == {("FAIL", "cuda:1")} and says in text_of(report, "cuda:1"), report
    assert "fix: " in text_of(report, "cuda:1")


def test_exclusive_gpu(machine):
    """One process may have it, two may not."""
    exclusive = "90,80,79,3,0"
    assert not bad(machine("--topology", TOPOLOGIES / "gpu-1p1d.json", gpus=[exclusive] * 2))
    report = machine("--topology", TOPOLOGIES / "one-gpu.json", gpus=[exclusive])
    assert bad(report) == {("FAIL", "cuda:0")}, report


@pytest.mark.parametrize("topology, gpu, unfit", [
    ("one-gpu", H100, set()),
    ("one-gpu", H200, {("warn", "cuda:0")}),
    ("one-h200", H200, set()),
    ("one-h200", H100, {("FAIL", "cuda:0")}),
    ("gpu-1p1d", H200, set()),
])
def test_pools_fit_the_real_model(machine, topology, gpu, unfit):
    """Dummy weights of the real size: 57 GiB count before the pools do."""
    flash = ROOT / "tests" / "bench" / "flash"
    report = machine("--topology", TOPOLOGIES / f"{topology}.json", "--model-dir", flash, "--load-format", "dummy",
                     gpus=[gpu, gpu])
    assert bad(report) - {("FAIL", "model")} == unfit, report  # no tokenizer.json there
    assert "56.97 GiB" in text_of(report, "weights")
    if ("warn", "cuda:0") in unfit:
        assert "unused" in text_of(report, "cuda:0") and "one-h200" in text_of(report, "cuda:0")


def test_shared_gpu_needs_pool_sizes(machine):
    report = machine("--device", "cuda:0", gpus=[H100])
    assert bad(report) == {("FAIL", "cuda:0")} and "--max-total-token-num" in text_of(report, "cuda:0")


@pytest.mark.parametrize("links, verdicts", [("nvlink", set()), ("pcie", {("warn", "nvlink")}),
                                             ("none", {("warn", "nvlink")})])
def test_nvlink(machine, links, verdicts):
    report = machine("--topology", TOPOLOGIES / "gpu-2p2d.json", gpus=[H100] * 4, env={"FAKE_LINKS": links})
    assert bad(report) == verdicts and "4 " in text_of(report, "nvlink"), report


def test_visible_devices(machine):
    flags = ("--topology", TOPOLOGIES / "gpu-1p1d.json")
    gpus = [H100, "80,80,79,0,0", H100]
    assert not bad(machine(*flags, gpus=gpus, env={"CUDA_VISIBLE_DEVICES": "2,0"}))
    report = machine(*flags, gpus=gpus, env={"CUDA_VISIBLE_DEVICES": "2"})
    assert "CUDA_VISIBLE_DEVICES=2" in text_of(report, "cuda:1")


@pytest.mark.parametrize("env, says", [({"FAKE_ERROR": "9"}, "Driver Not Loaded"),
                                       ({"FAKE_CUDA": "11080"}, "CUDA up to 11.8")])
def test_driver(machine, env, says):
    report = machine("--device", "cuda:0", gpus=[H100], env=env)
    assert any(v == "FAIL" and says in text for v, what, text in report if what == "driver"), report


def test_no_driver(machine):
    report = machine("--device", "cuda:0")
    assert "libnvidia-ml" in text_of(report, "driver"), report


def test_modules_that_do_not_load(machine, tmp_path):
    (tmp_path / "baton_cuda.so").write_text("not a library")
    (tmp_path / "baton_nccl.so").write_text("not a library")
    flags = ("--topology", TOPOLOGIES / "gpu-1p1d.json")
    assert bad(machine(*flags, gpus=[H100] * 2)) == {("FAIL", "cuda"), ("warn", "nccl")}
    report = machine(*flags, "--kv-transport", "nccl", gpus=[H100] * 2)
    assert bad(report) == {("FAIL", "cuda"), ("FAIL", "nccl")} and "baton_nccl.so" in text_of(report, "nccl")
    assert bad(machine(*flags, "--kv-transport", "ipc", gpus=[H100] * 2)) == {("FAIL", "cuda")}


def test_port_taken(machine):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        report = machine(port=s.getsockname()[1])
    assert ("FAIL", "port") in bad(report) and "in use" in text_of(report, "port")


def test_host_not_ours(machine):
    assert ("FAIL", "port") in bad(machine("--host", "192.0.2.1"))


def test_few_descriptors(machine):
    report = machine(limits=[(resource.RLIMIT_NOFILE, 1000)])
    assert ("warn", "files") in bad(report) and "16640" in text_of(report, "files"), report
    assert not bad(machine("--max-connections", 700, limits=[(resource.RLIMIT_NOFILE, 1000)]))
    assert ("FAIL", "files") in bad(machine(limits=[(resource.RLIMIT_NOFILE, 100)]))


def test_pages_do_not_fit(machine):
    report = machine("--max-total-token-num", 1 << 30)
    assert {("FAIL", "memory"), ("FAIL", "/dev/shm")} <= bad(report), report


def damaged(tmp_path, damage):
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    damage(model)
    return model


@pytest.mark.parametrize("what, damage, says", [
    ("weights", lambda m: (m / "model-00002-of-00002.safetensors").unlink(), "model-00002"),
    ("weights", lambda m: os.truncate(m / "model-00001-of-00002.safetensors", 1 << 20), "model-00001"),
    ("model", lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json"),
    ("model", lambda m: (m / "config.json").write_text('{"model_type": "llama"}'), "config.json"),
])
def test_model_damaged(machine, tmp_path, what, damage, says):
    model = damaged(tmp_path, damage)
    report = machine("--model-dir", model)
    assert ("FAIL", what) in bad(report) and says in text_of(report, what), report
    if what == "weights":
        assert not bad(machine("--model-dir", model, "--load-format", "dummy"))


def test_launch_script(machine, tmp_path):
    """It starts nothing where preflight fails, and passes its flags on."""
    started = tmp_path / "started"
    fake = tmp_path / "baton"
    fake.write_text(f'#!/bin/sh\n[ "$1" = preflight ] && exec {BATON} "$@"\necho "$@" > {started}\n')
    fake.chmod(0o755)
    env = {"BATON": str(fake)}
    report = machine(DEMO_MODEL, "--1p3d", gpus=[H100] * 3, command=(LAUNCH,), env=env)
    assert ("FAIL", "cuda:3") in bad(report) and not started.exists(), report
    assert subprocess.run([LAUNCH], capture_output=True).returncode == 2
    fake.write_text(f'#!/bin/sh\necho "$@" >> {started}\n')
    subprocess.run([LAUNCH, DEMO_MODEL, "--mtp-step", "3"], check=True, env={**os.environ, **env})
    check, serve = started.read_text().splitlines()
    flags = f"--model-dir {DEMO_MODEL} --topology {TOPOLOGIES}/gpu-2p2d.json --mtp-step 3"
    assert check == f"preflight {flags}" and serve == f"serve {flags}"


@pytest.mark.parametrize("bus, flags, says", [
    (None, (), "workers run on any core: /sys/bus/pci/devices/0001:10:00.0/local_cpulist"),
    (PCI_DEVICE, (), f"process=prefill-0 cpus={CPUS} near its GPU"),
    (PCI_DEVICE, ("--pin", "off"), ""),
])
def test_pinning(tmp_path, bus, flags, says):
    """serve asks the driver where a GPU is and starts the worker there; the programs are stand-ins."""
    if bus is None and not says.startswith("workers run on any core"):
        pytest.skip("no PCI device here, or not all of its cores are ours")
    report = 'echo "prefill on $(grep Cpus_allowed_list /proc/self/status) $CUDA_DEVICE_ORDER $NCCL_NVLS_ENABLE"'
    for name, does in (("router", "exec sleep 30"), ("decode", "exec sleep 30"), ("prefill", f"{report}; exit 2")):
        program = tmp_path / f"baton-{name}"
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
    topology = tmp_path / "topology.json"
    topology.write_text('{"prefill": [{"device": "cuda:0"}], "decode": [{}]}')
    env = {**os.environ, "BATON_BIN_DIR": str(tmp_path), "FAKE_GPUS": H100, **({"FAKE_BUS": bus} if bus else {}),
           "LD_LIBRARY_PATH": str(BUILD / "tests" / "deploy")}
    env.pop("NCCL_NVLS_ENABLE", None)
    r = subprocess.run([BATON, "serve", "--topology", topology, "--port", "0", *flags], capture_output=True,
                       text=True, env=env, timeout=30)
    assert r.returncode == 2 and says in r.stderr, r.stderr
    assert ("near its GPU" in r.stderr) == (bus is not None and not flags)
    started = [x for x in r.stderr.splitlines() if "prefill on" in x]
    assert started and "PCI_BUS_ID 0" in started[0], r.stderr
    if bus:
        assert f"\t{CPUS} " in started[0]


def test_topologies_are_json_with_a_purpose():
    for path in TOPOLOGIES.glob("*.json"):
        assert json.loads(path.read_text())["about"], path


def test_nothing_left_behind(machine, tmp_path):
    (tmp_path / "tmp").mkdir()
    machine(env={"TMPDIR": str(tmp_path / "tmp")})
    assert not list((tmp_path / "tmp").iterdir())
