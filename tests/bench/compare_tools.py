#!/usr/bin/env python3
"""The same load from other tools and from baton bench, figures side by side. Exit code 1 if a request
failed, a length differs, or a figure differs by more than --tolerance.

    python3 -m venv /tmp/s && /tmp/s/bin/pip install --no-deps sglang==0.4.6.post5 &&
        /tmp/s/bin/pip install aiohttp numpy pandas requests tqdm transformers pillow
    python3 -m venv /tmp/l && /tmp/l/bin/pip install vllm
    python3 tests/bench/compare_tools.py --sglang /tmp/s/bin/python --vllm /tmp/l/bin/vllm [--url URL]

Without --url they ask tests/bench/paced_server.py, whose figures are the same every time; a real server's
differ from run to run, and with the machine's other work. So the tools take turns, --rounds times, each
time with a warm-up (not measured) and with prompts that no one has asked before, and what is compared is all
rounds together: means by the number of requests, rates by time, of medians the median. Output lengths vary,
the same for every tool and in the same order: with one length requests end together, the next ones arrive
together, and how they queue for the same prefill chunk is a matter of luck.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIGURES = ["output_throughput", "mean_ttft_ms", "median_ttft_ms", "mean_itl_ms", "mean_e2el_ms"]
SEED = 1

# In a tool's own Python, since lengths are what its tokeniser says: a text for each wanted number of tokens.
TEXTS = """
import json, sys
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained(sys.argv[1])
around = len(t.encode(""))
for word in ("the", "a", "x", "1"):
    texts = {n: word + f" {word}" * (n - around - 1) for n in json.loads(sys.argv[2])}
    if all(len(t.encode(text)) == n for n, text in texts.items()):
        print(json.dumps(texts))
        break
else:
    sys.exit("no word of these is one token, however often it is repeated")
"""


def prompts(tool, round_, n):
    return [f"Round {round_}: {tool} asks for story number {i}, about a fox and {i % 7} dogs that live near the "
            "river." for i in range(n)]


def output_lens(args):
    low, _, high = args.output_len.partition(":")
    rng = random.Random(SEED)
    return [rng.randint(int(low), int(high or low)) for _ in range(args.num_prompts)]


def share_gpt(args, python, path, texts, shuffled):
    """shuffled: the tool shuffles with SEED; what it gets then is texts in their order."""
    lens = output_lens(args)
    r = subprocess.run([python, "-c", TEXTS, args.tokenizer, json.dumps(sorted(set(lens)))], capture_output=True,
                       text=True)
    if r.returncode:
        sys.exit(f"{python} makes no texts of given lengths:\n{r.stderr[-3000:]}")
    answer = json.loads(r.stdout.splitlines()[-1])
    order = list(range(len(texts)))
    if shuffled:
        random.Random(SEED).shuffle(order)
    talks = [None] * len(texts)
    for at, text, n in zip(order, texts, lens):
        talks[at] = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer[str(n)]}]}
    path.write_text(json.dumps(talks))


def run(command, log):
    with open(log, "w") as f:
        r = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, cwd=log.parent)
    if r.returncode:
        sys.exit(f"{command[0]} ended with {r.returncode}:\n" + log.read_text()[-3000:])


def with_sglang(args, round_, url, dir):
    script = subprocess.run([args.sglang, "-c", "import importlib.util as u; print(u.find_spec('sglang')"
                             ".submodule_search_locations[0])"], capture_output=True, text=True).stdout.strip()
    share_gpt(args, args.sglang, dir / "s.json", prompts("sglang", round_, args.num_prompts), shuffled=True)
    run([args.sglang, f"{script}/bench_serving.py", "--backend", "sglang-oai", "--base-url", url, "--model",
         args.model, "--tokenizer", args.tokenizer, "--dataset-name", "sharegpt", "--dataset-path", dir / "s.json",
         "--seed", SEED, "--num-prompts", args.num_prompts, "--max-concurrency", args.max_concurrency,
         "--warmup-requests", args.num_warmups, "--disable-tqdm", "--output-file", dir / "s.out"], dir / "s.log")
    result = json.loads((dir / "s.out").read_text().splitlines()[-1])
    return {**result, "mean_e2el_ms": result["mean_e2e_latency_ms"]}


def with_vllm(args, round_, url, dir):
    python = pathlib.Path(args.vllm).parent / "python"
    share_gpt(args, python, dir / "v.json", prompts("vllm", round_, args.num_prompts), shuffled=False)
    run([args.vllm, "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
         "--model", args.model, "--tokenizer", args.tokenizer, "--dataset-name", "sharegpt", "--dataset-path",
         dir / "v.json", "--disable-shuffle", "--num-prompts", args.num_prompts, "--max-concurrency",
         args.max_concurrency, "--num-warmups", args.num_warmups, "--ignore-eos", "--percentile-metrics",
         "ttft,tpot,itl,e2el", "--disable-tqdm", "--save-result", "--result-dir", dir, "--result-filename", "v.out"],
        dir / "v.log")
    return json.loads((dir / "v.out").read_text())


def with_baton(args, round_, url, dir):
    n = args.num_prompts + args.num_warmups
    lens = output_lens(args) + [16] * args.num_warmups
    (dir / "b.jsonl").write_text("".join(json.dumps({"prompt": t, "output_tokens": k}) + "\n" for t, k in
                                         zip(prompts("baton", round_, n), lens)))
    run([args.baton, "bench", "--url", url, "--model", args.model, "--data", dir / "b.jsonl", "--num-prompts",
         args.num_prompts, "--num-warmups", args.num_warmups, "--max-concurrency", args.max_concurrency, "--json",
         dir / "b.out"], dir / "b.log")
    return json.loads((dir / "b.out").read_text())["summary"]


def median(values):
    v, n = sorted(values), len(values)
    return (v[(n - 1) // 2] + v[n // 2]) / 2


def pooled(rounds):
    """Of all rounds' requests together, as far as each round's own figures tell."""
    completed = sum(r["completed"] for r in rounds)
    tokens = sum(r["total_output_tokens"] for r in rounds)
    all_ = {"completed": completed, "total_output_tokens": tokens,
            "output_throughput": tokens / sum(r["duration"] for r in rounds)}
    for f in FIGURES[1:]:
        all_[f] = (median([r[f] for r in rounds]) if f.startswith("median") else
                   sum(r[f] * r["completed"] for r in rounds) / max(completed, 1))
    return all_


def show(name, r):
    print(f"{name:20}{r['completed']:20}" + "".join(f"{r[f]:20.2f}" for f in FIGURES), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sglang", help="a Python that has sglang")
    p.add_argument("--vllm", help="the program vllm")
    p.add_argument("--baton", default=ROOT / "build/deploy/baton")
    p.add_argument("--url")
    p.add_argument("--model", default="demo-model")
    p.add_argument("--tokenizer", default=ROOT / "deploy/demo-model", help="the tools count prompts with it")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--num-prompts", type=int, default=200, help="of each tool in each round")
    p.add_argument("--num-warmups", type=int, default=16, help="before them")
    p.add_argument("--output-len", default="24:72", help="tokens, A:B or N")
    p.add_argument("--max-concurrency", type=int, default=16)
    p.add_argument("--tolerance", type=float, default=0.05)
    args = p.parse_args()
    args.baton = pathlib.Path(args.baton).resolve()  # tools run in a directory of their own
    server = None if args.url else subprocess.Popen(
        [sys.executable, HERE / "paced_server.py", "--ttft-ms", "200", "--itl-ms", "20"], stdout=subprocess.PIPE,
        text=True)
    url = args.url or server.stdout.readline().strip()
    tools = [(name, run_it) for name, run_it, wanted in (("sglang", with_sglang, args.sglang),
                                                         ("vllm", with_vllm, args.vllm),
                                                         ("baton", with_baton, True)) if wanted]
    rounds = {name: [] for name, _ in tools}
    print(f"{'':20}" + "".join(f"{f:>20}" for f in ["completed", *FIGURES]))
    try:
        for i in range(args.rounds):
            for name, run_it in tools:
                with tempfile.TemporaryDirectory() as dir:
                    rounds[name].append(run_it(args, i + 1, url, pathlib.Path(dir)))
                show(f"{name}, round {i + 1}", rounds[name][-1])
    finally:
        if server:
            server.kill()
    results = {name: pooled(r) for name, r in rounds.items()}
    good = True
    for name, r in results.items():
        show(name, r)
        good &= r["completed"] == args.rounds * args.num_prompts
        good &= r["total_output_tokens"] == args.rounds * sum(output_lens(args))
        for f in FIGURES:
            good &= abs(r[f] - results["baton"][f]) <= args.tolerance * results["baton"][f]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
