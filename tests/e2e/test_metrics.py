"""What /metrics promises to dashboards: names, labels, and data for their queries from a real Prometheus."""

import enum
import json
import math
import re
import shutil
import socket
import subprocess
import typing
import urllib.error
import urllib.parse
import urllib.request

import pytest

from cluster import ROOT, gather, wait

ASK = {"messages": [{"role": "user", "content": "What is a dog? Say it " + "again and " * 60 + "once more."}],
       "temperature": 0, "stream": True, "chat_template_kwargs": {"enable_thinking": False}}
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "baton.json").read_text())
NAME = r"\b((?:vllm:|baton_|process_)[a-z0-9_]+)"


def queries():
    return [t["expr"] for p in DASHBOARD["panels"] for t in p.get("targets", [])]


# The queries of the dashboard that vLLM ships, with the histograms' shapes spelled out.
QUANTILES = [f"histogram_quantile({p}, sum by(le) (rate(vllm:{n}_bucket{{M}}[R])))" for p in (0.99, 0.95, 0.9, 0.5)
             for n in ("e2e_request_latency_seconds", "time_per_output_token_seconds", "inter_token_latency_seconds",
                       "time_to_first_token_seconds")]
MEANS = [f"rate(vllm:{n}_sum{{M}}[R]) / rate(vllm:{n}_count{{M}}[R])" for n in
         ("e2e_request_latency_seconds", "time_per_output_token_seconds", "inter_token_latency_seconds",
          "time_to_first_token_seconds")]
VLLM = QUANTILES + MEANS + [
    "rate(vllm:prompt_tokens_total{M}[R])", "rate(vllm:generation_tokens_total{M}[R])",
    "vllm:num_requests_running{M}", "vllm:num_requests_waiting{M}",
    "vllm:gpu_cache_usage_perc{M}", "vllm:kv_cache_usage_perc{M}",
    "sum by(le) (increase(vllm:request_prompt_tokens_bucket{M}[R]))",
    "sum by(le) (increase(vllm:request_generation_tokens_bucket{M}[R]))",
    "sum by(finished_reason) (increase(vllm:request_success_total{M}[R]))",
    "rate(vllm:request_queue_time_seconds_sum{M}[R])", "rate(vllm:request_prefill_time_seconds_sum{M}[R])",
    "rate(vllm:request_decode_time_seconds_sum{M}[R])",
    "rate(vllm:request_max_num_generation_tokens_sum{M}[R])",
    "rate(vllm:gpu_prefix_cache_hits_total{M}[R]) / rate(vllm:gpu_prefix_cache_queries_total{M}[R])",
    "sum (rate(vllm:iteration_tokens_total_count{M}[R]))",
    "rate(vllm:request_time_per_output_token_seconds_sum{M}[R])", "vllm:cache_config_info{M}",
    "rate(vllm:request_inference_time_seconds_sum{M}[R])", "vllm:request_params_n_count{M}",
    "vllm:request_params_max_tokens_sum{M}",
]


def series(cluster):
    """{name: [labels of a series]} and the types, as /metrics has them."""
    text = cluster.get("/metrics")[2]
    found, types = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, types[name] = line.split()
        elif not line.startswith("#"):
            name, labels = re.match(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? \S+$", line).groups()
            found.setdefault(name, []).append(dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")))
    return found, types


def test_names(cluster):
    found, types = series(cluster)
    assert len(types) == len(set(types))
    for name in types:  # counters end as Prometheus wants it; vLLM's one histogram does too
        assert name.endswith("_total") == (types[name] == "counter") or name == "vllm:iteration_tokens_total", name
    for query in queries() + VLLM:
        names = re.findall(NAME, query)
        assert names, query
        for name in names:
            assert name in found, f"{name} in {query}"
    for autoscaled in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert {x["engine"] for x in found[autoscaled]} == {"prefill/0", "decode/0"}
    assert {x["engine"] for x in found["vllm:num_requests_waiting"]} == {"router", "prefill/0"}


def test_dashboard(cluster):
    """Every label that a query selects or groups by is one of the metric's."""
    found, _ = series(cluster)
    for query in queries():
        for name, selector in re.findall(NAME + r"\{([^}]*)\}", query):
            for label in re.findall(r"(\w+)\s*[=!]", selector):
                assert any(label in x for x in found[name]), f"{label} of {name} in {query}"
        for label in re.findall(r"\bby\((\w+)\)", query):
            assert any(label in x for n in re.findall(NAME, query) for x in found[n]), f"{label} in {query}"
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and all(p["title"] for p in DASHBOARD["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(places) == len(set(places))


def test_dashboard_is_grafanas():
    """Read and written again by Grafana's own types nothing is lost, and every choice is one of theirs."""
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    known = Dashboard.from_json(json.loads(json.dumps(DASHBOARD)))
    again = json.loads(json.dumps(known, cls=JSONEncoder))

    def lost(a, b, path):
        if isinstance(a, dict) and isinstance(b, dict):
            return [x for k, v in a.items() for x in lost(v, b.get(k), f"{path}.{k}")]
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            return [x for i, v in enumerate(a) for x in lost(v, b[i], f"{path}[{i}]")]
        return [] if a == b else [f"{path}: {a} {b}"]

    # A variable's definition is what Grafana's editor keeps beside its query.
    assert [x for x in lost(DASHBOARD, again, "") if ".definition: label_values" not in x] == []

    n_choices = 0

    def choices(o):
        nonlocal n_choices
        for v in o if isinstance(o, list) else o.values() if isinstance(o, dict) else ():
            choices(v)
        if not type(o).__module__.startswith("grafana"):
            return
        hints = typing.get_type_hints(type(o))
        for name, v in vars(o).items():
            choices(v)
            for t in (hints.get(name), *typing.get_args(hints.get(name))):
                if isinstance(t, type) and issubclass(t, enum.Enum) and isinstance(v, (str, int)):
                    t(v)  # ValueError: no such choice
                    n_choices += 1

    choices(known)
    assert n_choices > 100


def test_open_descriptors(cluster):
    def shown():
        return int(cluster.get("/metrics")[2].split("\nprocess_open_fds ")[1].split("\n")[0])

    def more(n):
        """Each of n idle connections is one; the scrape's own is open while it is counted."""
        wait(lambda: cluster.fds() == before + n, 5, f"{n} connections are open", cluster.log)
        assert shown() == before + n + 1

    wait(lambda: cluster.admin("router", "accounting")["http"]["connections"] == 0, 5, "no connections", cluster.log)
    before = cluster.fds()
    more(0)
    held = [socket.create_connection((cluster.host, cluster.port)) for _ in range(20)]
    more(20)
    for s in held:
        s.close()
    more(0)


def test_what_is_counted(cluster):
    def value(name, **labels):
        text = cluster.get("/metrics")[2]
        for line in text.splitlines():
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"{name} {labels} is not there")

    counted = ["vllm:request_max_num_generation_tokens_count", "vllm:request_params_n_count",
               "vllm:request_params_n_sum", "vllm:time_per_output_token_seconds_count", "baton_handoff_gap_seconds_count",
               "baton_event_delay_seconds_count"]
    before = {n: value(n) for n in counted}
    grants = value("baton_grants_total", engine="decode/0")
    a, b = gather(cluster, "/v1/chat/completions", [ASK, {**ASK, "n": 3, "temperature": 1, "seed": 1}])
    assert a.error is None and b.error is None
    after = {n: value(n) for n in counted}
    assert after["vllm:request_max_num_generation_tokens_count"] - before["vllm:request_max_num_generation_tokens_count"] == 4
    assert after["vllm:request_params_n_count"] - before["vllm:request_params_n_count"] == 2
    assert after["vllm:request_params_n_sum"] - before["vllm:request_params_n_sum"] == 4
    assert after["baton_handoff_gap_seconds_count"] - before["baton_handoff_gap_seconds_count"] == 4
    # Two streams, one of them of three choices: one event for each token, or for the choices of a step together.
    events = after["baton_event_delay_seconds_count"] - before["baton_event_delay_seconds_count"]
    assert 4 < events <= len(a.events) + len(b.events)
    assert after["vllm:time_per_output_token_seconds_count"] == value("vllm:inter_token_latency_seconds_count")
    # Workers tell these with their next beat, each with its own.
    wait(lambda: value("baton_grants_total", engine="decode/0") == grants + 4, 5, "the grants show", cluster.log)
    for engine in ("prefill/0", "decode/0"):
        for name in ("baton_steps_total", "baton_step_time_seconds_total"):
            wait(lambda: value(name, engine=engine) > 0, 5, f"{name} of {engine} shows", cluster.log)
    wait(lambda: value("baton_host_gap_seconds_total", engine="decode/0") > 0, 5, "a gap shows", cluster.log)


# ---- a real Prometheus ----

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def prometheus(cluster, tmp_path):
    """query(expression) -> values, of one that scrapes the cluster as deploy/observe would, but faster."""
    port = free_port()
    config = (ROOT / "deploy" / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(config.replace("5s", "250ms").replace("8088", str(cluster.port)))
    log = open(tmp_path / "log", "wb")
    p = subprocess.Popen(["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                          f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def query(expression):
        data = urllib.parse.urlencode({"query": expression}).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query", data, timeout=10) as r:
                return [float(x["value"][1]) for x in json.load(r)["data"]["result"]]
        except urllib.error.HTTPError as e:
            if e.code == 503:
                return []  # it starts
            raise AssertionError(f"{expression}: {e.read().decode()}")
        except OSError:
            assert p.poll() is None, (tmp_path / "log").read_text()
            return []  # not even that

    yield query
    p.terminate()
    p.wait(20)
    log.close()


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus here")
def test_dashboards_show_data(cluster, prometheus):
    """vLLM's queries and ours, all of them, while there is some load."""
    def concrete(expression):
        for name, text in [("{M}", '{model_name="demo-model"}'), ("[R]", "[10s]"), ("$__rate_interval", "10s"),
                           ("$model_name", "demo-model"), ("$worker", ".*")]:
            expression = expression.replace(name, text)
        return expression

    left = {concrete(q) for q in queries() + VLLM}
    assert len(left) > 70
    wait(lambda: prometheus("up") == [1.0], 20, "it scrapes", cluster.log)

    def all_answered():
        gather(cluster, "/v1/chat/completions", [ASK] * 3)
        for q in sorted(left):
            if any(math.isfinite(v) for v in prometheus(q)):
                left.discard(q)
        return not left

    wait(all_answered, 20, f"data for all queries; still without: {left}", lambda: "\n".join(sorted(left)))
