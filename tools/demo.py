"""The whole of peft_fx on a real model: SmolLM2-135M, fine-tuned on CPython's own help texts. Run by tools/demo.sh."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from smollm2 import Unavailable, load
from text import blocks
from torch.nn import functional as F

import peft_fx

console = Console(width=max(110, Console().width))
timings: list[tuple[str, float, str]] = []


@contextlib.contextmanager
def step(title: str):
    """Shows a step while it runs and files its time; yields a list whose items become the note beside it."""
    notes: list[str] = []
    start = time.perf_counter()
    with console.status(f"{title} ..."):
        yield notes
    seconds = time.perf_counter() - start
    timings.append((title, seconds, "; ".join(notes)))
    console.print(f"[green]✓[/] {title}  [dim]{seconds:.1f} s[/]  {'; '.join(notes)}")


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy of a batch of token blocks."""
    return F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model, held_out: torch.Tensor) -> float:
    model.eval()
    return sum(float(loss_of(model, batch)) for batch in held_out.split(4)) / len(held_out.split(4))


@torch.no_grad()
def generate(model, tokenizer, prompt: str, count: int) -> str:
    """Greedy decoding; the captured graph has no cache, so every token runs the whole text."""
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0])


def train(model, data: torch.Tensor, steps: int, lr: float) -> list[float]:
    """AdamW over the adapter's parameters; returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fine-tuning", total=steps)
        for i in range(steps):
            loss = loss_of(model, data[4 * i : 4 * i + 4])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"fine-tuning, loss {losses[-1]:.3f}")
    return losses


@dataclass(frozen=True)
class Length:
    """How much the demo does: training steps, and those of the second adapter, blocks of held-out text, generated tokens,
    swaps to and fro."""

    steps: int = 30
    second: int = 4
    held_out: int = 24
    tokens: int = 24
    swaps: int = 2


QUICK = Length(steps=4, second=1, held_out=4, tokens=6, swaps=1)


def main(length: Length, folder: Path) -> None:
    steps = length.steps
    torch.manual_seed(0)
    with step("load SmolLM2-135M-Instruct") as notes:
        model, tokenizer = load()
        data, held_out = blocks(tokenizer, 96, 0)
        held_out = held_out[: length.held_out]
        notes.append(f"{len(data)} training blocks of 96 tokens")
    with step("capture") as notes:
        graph = peft_fx.capture(model)
        notes.append(f"{len(graph.graph.nodes)} nodes, train and eval")
    config = peft_fx.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with step("apply LoRA r=16 to every linear") as notes:
        tuned = peft_fx.apply(graph, config)
        notes.append(str(peft_fx.trainable_parameters(tuned)))
    prompt = 'The "with" statement'
    with step("held-out loss before") as notes:
        before = held_out_loss(tuned, held_out)
        notes.append(f"{before:.4f}")
    with step(f"fine-tune {steps} steps of 4 x 96 tokens") as notes:
        losses = train(tuned, data, steps, lr=4e-4)
        notes.append(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    with step("held-out loss after") as notes:
        after = held_out_loss(tuned, held_out)
        notes.append(f"{after:.4f}  ({after - before:+.4f})")
    with step(f"generate {length.tokens} tokens with and without the adapter"):
        with peft_fx.disable_adapter(tuned):
            console.print(f"  [dim]base:   {generate(tuned, tokenizer, prompt, length.tokens)!r}[/]")
        console.print(f"  [bold]tuned:  {generate(tuned, tokenizer, prompt, length.tokens)!r}[/]")
    with step("save the adapter in PEFT's format") as notes:
        first = peft_fx.save_adapter(tuned, folder / "first")
        notes.append(", ".join(sorted(p.name for p in first.iterdir())))
    with step("a second adapter, r=8, a few steps") as notes:
        other = peft_fx.apply(graph, peft_fx.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"), "second")
        train(other, data[4 * steps :], length.second, lr=1e-3)
        second = peft_fx.save_adapter(other, folder / "second")
    ids = held_out[:2]
    tuned.eval(), other.eval()
    with step("compile (Inductor, the layers once)") as notes, torch.no_grad():
        compiled = peft_fx.compile(tuned)
        expected = logits(tuned, ids)
        notes.append(f"greatest difference to eager {float((logits(compiled, ids) - expected).abs().max()):.1e}")
    with step("hot-swap adapters in the compiled graph") as notes, torch.no_grad():
        with torch.compiler.set_stance("fail_on_recompile"):
            swaps = [peft_fx.hotswap(compiled, path) for path in (second, first) * length.swaps]
            peft_fx.hotswap(compiled, second)
            swapped = logits(compiled, ids)
            peft_fx.hotswap(compiled, first)
        difference = float((swapped - logits(other, ids)).abs().max())
        median = sorted(s.seconds for s in swaps)[len(swaps) // 2]
        notes.append(
            f"0 recompiles, {1e3 * median:.0f} ms a swap from the file, difference to the second adapter {difference:.1e}"
        )
    with step("merge") as notes, torch.no_grad():
        merged = peft_fx.merge(tuned)
        notes.append(f"greatest difference {float((logits(merged, ids) - expected).abs().max()):.1e}")
        bits = all(
            torch.equal(a, b) for a, b in zip(peft_fx.unmerge(merged).parameters(), tuned.parameters(), strict=True)
        )
        notes.append(f"unmerge is bit-exact: {bits}")
    with step("export the merged model to .pt2") as notes:
        peft_fx.export(merged, folder / "merged.pt2")
        notes.append(f"{(folder / 'merged.pt2').stat().st_size / 2**20:.0f} MiB")
    with step("reload it") as notes, torch.no_grad():
        loaded = peft_fx.load(folder / "merged.pt2")
        notes.append(f"greatest difference {float((logits(loaded, ids) - logits(merged, ids)).abs().max()):.1e}")
    table = Table(title=f"peft_fx on SmolLM2-135M, torch {torch.__version__}, {torch.get_num_threads()} threads")
    table.add_column("step"), table.add_column("seconds", justify="right"), table.add_column("what came out")
    for title, seconds, note in timings:
        table.add_row(title, f"{seconds:.1f}", note)
    table.add_row("total", f"{sum(t[1] for t in timings):.0f}", "")
    console.print(table)
    if not after < before:
        raise SystemExit("the held-out loss did not fall")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, help=f"training steps (default: {Length.steps}; with --quick {QUICK.steps})"
    )
    parser.add_argument("--quick", action="store_true", help="the same steps in short: under two minutes")
    parser.add_argument("--out", type=Path, help="folder for adapters and the .pt2 (default: a temporary one)")
    arguments = parser.parse_args()
    length = QUICK if arguments.quick else Length()
    if arguments.steps is not None:
        if arguments.steps < 1:
            parser.error(f"--steps {arguments.steps}: expected 1 or more")
        length = replace(length, steps=arguments.steps)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            out = arguments.out or Path(temporary)
            out.mkdir(parents=True, exist_ok=True)
            main(length, out)
    except (Unavailable, peft_fx.PeftFxError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
