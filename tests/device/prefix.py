"""The programs that tests/device/pack gathered, for the scripts here. Only the standard library, since a
machine with GPUs may have no more."""

import os
import pathlib
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def use(directory):
    """Makes PREFIX what tests/e2e/cluster.py, imported after this, starts."""
    prefix = pathlib.Path(directory).resolve()
    os.environ["E2E_BUILD_DIR"] = str(prefix)
    os.environ["LD_LIBRARY_PATH"] = f"{prefix}/lib:/usr/local/cuda/lib64:" + os.environ.get("LD_LIBRARY_PATH", "")
    sys.path.insert(0, str(ROOT / "tests" / "e2e"))
    return prefix


def flash_dir():
    """A model directory with the real sizes and no weights; the tokeniser is the demo model's."""
    to = pathlib.Path(tempfile.mkdtemp()) / "flash"
    to.mkdir()
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "deploy" / "demo-model" / f, to)
    shutil.copy(ROOT / "tests" / "bench" / "flash" / "config.json", to)
    return to


def sharegpt(prefix):
    """Flags of baton bench for real prompts, if PREFIX/sharegpt.jsonl is there."""
    data = prefix / "sharegpt.jsonl"
    if not data.exists():
        return []
    return ["--data", data, "--prompts", "ids", "--extra-body", '{"skip_special_tokens": false}']
