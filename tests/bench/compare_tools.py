#!/usr/bin/env python3
"""The same load from other tools and from baton bench, figures side by side. Exit code 1 if a request
failed or a figure differs by more than --tolerance.

    python3 -m venv /tmp/s && /tmp/s/bin/pip install --no-deps sglang==0.4.6.post5 &&
        /tmp/s/bin/pip install aiohttp numpy pandas requests tqdm transformers pillow
    python3 -m venv /tmp/l && /tmp/l/bin/pip install vllm
    python3 tests/bench/compare_tools.py --sglang /tmp/s/bin/python --vllm /tmp/l/bin/vllm [--url URL]

Without --url they ask tests/bench/paced_server.py, whose figures are the same every time; a real server's
differ from run to run by more than the tools do unless the machine is quiet. Tools run one after the
other; to a server with a prefix cache the later ones look faster, so each gets prompts of its own.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIGURES = ["output_throughput", "mean_ttft_ms", "median_ttft_ms", "mean_itl_ms", "mean_e2el_ms"]


def prompts(tool, n):
    return [f"{tool} asks for story number {i}, about a fox and {i % 7} dogs that live near the river." for i in
            range(n)]


def share_gpt(path, texts, n_output):
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": t},
                                                   {"from": "gpt", "value": "word " * n_output}]} for t in texts]))


def run(command, log):
    with open(log, "w") as f:
        r = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, cwd=log.parent)
    if r.returncode:
        sys.exit(f"{command[0]} ended with {r.returncode}:\n" + log.read_text()[-3000:])


def with_sglang(args, model, url, dir):
    script = subprocess.run([args.sglang, "-c", "import importlib.util as u; print(u.find_spec('sglang')"
                             ".submodule_search_locations[0])"], capture_output=True, text=True).stdout.strip()
    share_gpt(dir / "s.json", prompts("sglang", args.num_prompts), args.output_len)
    run([args.sglang, f"{script}/bench_serving.py", "--backend", "sglang-oai", "--base-url", url, "--model", model,
         "--tokenizer", args.tokenizer, "--dataset-name", "sharegpt", "--dataset-path", dir / "s.json",
         "--sharegpt-output-len", args.output_len, "--num-prompts", args.num_prompts, "--max-concurrency",
         args.max_concurrency, "--disable-tqdm", "--output-file", dir / "s.out"], dir / "s.log")
    result = json.loads((dir / "s.out").read_text().splitlines()[-1])
    return {**result, "mean_e2el_ms": result["mean_e2e_latency_ms"]}


def with_vllm(args, model, url, dir):
    share_gpt(dir / "v.json", prompts("vllm", args.num_prompts), args.output_len)
    run([args.vllm, "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
         "--model", model, "--tokenizer", args.tokenizer, "--dataset-name", "sharegpt", "--dataset-path",
         dir / "v.json", "--sharegpt-output-len", args.output_len, "--num-prompts", args.num_prompts,
         "--max-concurrency", args.max_concurrency, "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl,e2el",
         "--disable-tqdm", "--save-result", "--result-dir", dir, "--result-filename", "v.out"], dir / "v.log")
    return json.loads((dir / "v.out").read_text())


def with_baton(args, model, url, dir):
    (dir / "b.jsonl").write_text("".join(json.dumps({"prompt": t, "output_tokens": args.output_len}) + "\n" for t in
                                         prompts("baton", args.num_prompts)))
    run([args.baton, "bench", "--url", url, "--model", model, "--data", dir / "b.jsonl", "--num-prompts",
         args.num_prompts, "--max-concurrency", args.max_concurrency, "--json", dir / "b.out"], dir / "b.log")
    return json.loads((dir / "b.out").read_text())["summary"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sglang", help="a Python that has sglang")
    p.add_argument("--vllm", help="the program vllm")
    p.add_argument("--baton", default=ROOT / "build/deploy/baton")
    p.add_argument("--url")
    p.add_argument("--model", default="demo-model")
    p.add_argument("--tokenizer", default=ROOT / "deploy/demo-model", help="the tools count prompts with it")
    p.add_argument("--num-prompts", type=int, default=200)
    p.add_argument("--output-len", type=int, default=40)
    p.add_argument("--max-concurrency", type=int, default=16)
    p.add_argument("--tolerance", type=float, default=0.05)
    args = p.parse_args()
    server = None if args.url else subprocess.Popen(
        [sys.executable, HERE / "paced_server.py", "--ttft-ms", "200", "--itl-ms", "20"], stdout=subprocess.PIPE,
        text=True)
    url = args.url or server.stdout.readline().strip()
    tools = [(name, run_it) for name, run_it, wanted in (("sglang", with_sglang, args.sglang),
                                                         ("vllm", with_vllm, args.vllm),
                                                         ("baton", with_baton, True)) if wanted]
    results = {}
    try:
        with tempfile.TemporaryDirectory() as dir:
            for name, run_it in tools:
                results[name] = run_it(args, args.model, url, pathlib.Path(dir))
    finally:
        if server:
            server.kill()
    print(f"{'':20}" + "".join(f"{f:>20}" for f in ["completed", *FIGURES]))
    good = True
    for name, r in results.items():
        print(f"{name:20}{r['completed']:20}" + "".join(f"{r[f]:20.2f}" for f in FIGURES))
        good &= r["completed"] == args.num_prompts
        for f in FIGURES:
            good &= abs(r[f] - results["baton"][f]) <= args.tolerance * results["baton"][f]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
