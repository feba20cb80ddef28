"""peft_fx against PEFT in one run: interleaved rounds, medians of the ratios.   python tools/bench.py [--quick]

Prints tables and writes them to docs/benchmarks.md (with --quick: prints only, on a small random model).
"""

from __future__ import annotations

import argparse
import copy
import io
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from smollm2 import load
from torch.nn import functional as F

import peft_fx

ROUNDS = 7
SWAP_RANKS = (16, 8, 4, 2, 1) * 4
console = Console()


@dataclass(frozen=True)
class Row:
    """One comparison: the same work done by us and by PEFT, fresh operands from `setup` each time."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def main(quick: bool) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, name = small_model() if quick else (load()[0], "SmolLM2-135M")
    start = time.perf_counter()
    graph = peft_fx.capture(model)
    captured = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rows = [(row.name, *measure(row)) for row in comparisons(model, graph, Path(folder))]
        swaps = swap_times(graph, Path(folder), model.config.vocab_size)
    tables = [comparison_table(name, captured, rows), swap_table(swaps)]
    for table in tables:
        console.print(table)
    if not quick:
        write(tables)


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=512
    )
    return LlamaForCausalLM(config).eval(), "4-layer Llama, 256 wide"


def comparisons(model, graph, folder: Path) -> list[Row]:
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(folder / "adapter")
    tuned = peft_fx.load_adapter(graph, folder / "adapter", trainable=True)
    ids = torch.randint(0, model.config.vocab_size, (2, 64))
    spare = [copy.deepcopy(model) for _ in range(2)]

    def inject():
        peft.get_peft_model(spare[0], config).unload()

    def step(model, **options):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    def cycle():
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    return [
        Row("apply LoRA r16 to every linear, after capture", lambda: peft_fx.apply(graph, config), inject),
        Row("swap an adapter from its file", lambda: peft_fx.hotswap(tuned, folder / "adapter"),
            lambda: hotswap_adapter(theirs, str(folder / "adapter"), "default")),
        Row("merge, then unmerge", lambda: peft_fx.unmerge(peft_fx.merge(tuned)), cycle),
        Row("training step, 2 x 64 tokens, eager", lambda: step(tuned), lambda: step(theirs, use_cache=False)),
    ]  # fmt: skip


def measure(row: Row) -> tuple[float, float, float]:
    """(our median, their median, median of the rounds' ratios), seconds; one warm-up round."""
    pairs = []
    for i in track(range(ROUNDS + 1), description=row.name, console=console, transient=True):
        order = (row.ours, row.theirs) if i % 2 else (row.theirs, row.ours)
        times = {work: seconds(work) for work in order}
        pairs.append((times[row.ours], times[row.theirs]))
    ours, theirs = zip(*pairs[1:], strict=True)
    return statistics.median(ours), statistics.median(theirs), statistics.median(a / b for a, b in pairs[1:])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def swap_times(graph, folder: Path, vocabulary: int) -> dict[int, list[float]]:
    """Rank -> seconds per swap, over 20 swaps of different ranks and scales into one compiled graph, 0 recompiles."""
    for rank in set(SWAP_RANKS):
        config = peft_fx.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules="all-linear", init_lora_weights=False)
        peft_fx.save_adapter(peft_fx.apply(graph, config), folder / f"rank{rank}")
    tuned = peft_fx.prepare_hotswap(peft_fx.load_adapter(graph, folder / "rank1"), max_rank=max(SWAP_RANKS))
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, vocabulary, (2, 16))
    times: dict[int, list[float]] = {}
    with torch.no_grad():
        compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
        with torch.compiler.set_stance("fail_on_recompile"):
            for rank in SWAP_RANKS:
                times.setdefault(rank, []).append(peft_fx.hotswap(compiled, folder / f"rank{rank}").seconds)
                compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
    return times


def comparison_table(name: str, captured: float, rows) -> Table:
    table = Table(
        title=f"{name}: peft_fx against PEFT {peft.__version__}, medians of {ROUNDS} rounds (capture {captured:.1f} s)"
    )
    for column in ("", "peft_fx, ms", "PEFT, ms", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, ours, theirs, ratio in rows:
        table.add_row(name, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{ratio:.2f}")
    return table


def swap_table(times: dict[int, list[float]]) -> Table:
    count = sum(map(len, times.values()))
    table = Table(
        title=f"{count} swaps of different ranks and scales into one compiled graph (slot r={max(times)}), 0 recompiles"
    )
    for column in ("rank of the new adapter", "swaps", "median, ms", "slowest, ms"):
        table.add_column(column, justify="right")
    for rank, found in times.items():
        table.add_row(str(rank), str(len(found)), f"{1e3 * statistics.median(found):.1f}", f"{1e3 * max(found):.1f}")
    return table


def write(tables: list[Table]) -> None:
    """docs/benchmarks.md: the machine, then the tables as text."""
    paper = Console(width=120, file=io.StringIO())
    for table in tables:
        paper.print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    head = f"# Benchmarks\n\nWritten by `python tools/bench.py`. {machine}, torch {torch.__version__}.\n\n"
    text = f"{head}```\n{paper.file.getvalue()}```\n"
    (Path(__file__).parent.parent / "docs" / "benchmarks.md").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small random model; docs/benchmarks.md is left alone")
    main(parser.parse_args().quick)
