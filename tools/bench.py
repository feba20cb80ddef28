"""peft_fx against PEFT in one run.   python tools/bench.py [--quick] [--only PART ...]

Every contender is a process of its own (contenders.py); they take turns round by round, and a figure is the median of the
rounds' ratios. Prints tables; without --quick they are written to docs/benchmarks.md, under what has been said there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import peft
import torch
from packed_bench import packed_rows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from verbs_bench import verb_rows

ROUNDS = 7
HERE = Path(__file__).resolve().parent
FILE = HERE.parent / "docs" / "benchmarks.md"
MARK = "<!-- figures: written by tools/bench.py, everything below -->"
console = Console()


@dataclass(frozen=True)
class Line:
    """One line of a table. goal: the largest ratio that is good enough, None where there is none."""

    name: str
    ours: str
    theirs: str
    ratio: float
    goal: float | None = None


class Worker:
    """A contender's process."""

    def __init__(self, **options):
        self.cache = tempfile.TemporaryDirectory()
        # an empty cache of its own: a cold start is cold, and nobody profits from another's
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": self.cache.name, "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contenders.py"), json.dumps(options)], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        first = self.answer()
        self.captured, self.made = first["captured"], first["made"]

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("bench:"):
                return json.loads(line.removeprefix("bench:"))
        raise RuntimeError(f"a contender stopped: {self.process.args}")

    def __call__(self, do: str, **options) -> float:
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        return answer.get("bytes", answer.get("seconds"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.cache.cleanup()


@contextmanager
def workers(**options: dict) -> Iterator[dict[str, Worker]]:
    """Name -> started contender."""
    with ExitStack() as stack:
        started = {}
        for name, chosen in options.items():
            started[name] = Worker(**chosen)
            stack.callback(started[name].close)
        yield started


def rounds(contenders: dict[str, Worker], count: int, do: str, **options) -> dict[str, list[float]]:
    """Contender -> one figure per round, after a round to warm up; who begins changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(count + 1):
        for name in names if i % 2 else reversed(names):
            value = contenders[name](do, **options)
            if i:
                found[name].append(value)
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def best(found: dict[str, list[float]], library: str) -> list[float]:
    """The figures of the library's faster contender."""
    return min((v for k, v in found.items() if k.startswith(library)), key=statistics.median)


def ms(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.1f} ms"


def both_ways(library: str, compiled: bool = True, **options) -> dict[str, dict]:
    """The contenders of a library, eager and, if wanted, compiled."""
    compiler = "peft_fx" if library == "peft_fx" else "torch"
    found = {f"{library}, eager": dict(library=library, compiler=None, **options)}
    return found | ({f"{library}, compiled": dict(library=library, compiler=compiler, **options)} if compiled else {})


def against_peft(count: int, compiled: bool, do: str, options: dict, **asked) -> tuple[list[float], list[float]]:
    """What ours and PEFT's best way took, of eager and, if wanted, compiled."""
    kinds = both_ways("peft_fx", compiled, **options) | both_ways("peft", compiled, **options)
    with workers(**kinds) as started:
        for worker in started.values():
            worker("compile")
        found = rounds(started, count, do, **asked)
    return best(found, "peft_fx,"), best(found, "peft,")


# Parts


def steady(model: str, quick: bool) -> list[Line]:
    """Cold starts, then steady calls, of the six contenders."""
    kinds = {**both_ways("bare", model=model), **both_ways("peft", model=model), **both_ways("peft_fx", model=model)}
    kinds["bare, compiled by peft_fx"] = dict(library="bare", compiler="peft_fx", model=model)
    lines = []
    with workers(**kinds) as started:
        for do, goals in (("inference", (0.20, 1.0, 0.5)), ("training", (0.20, 0.95, 0.6))):
            cold = {}
            for name, worker in started.items():
                worker("compile")
                cold[name] = worker(do)
            ours, theirs = cold["peft_fx, compiled"], cold["peft, compiled"]
            lines.append(
                Line(f"{model}: cold compile, {do}", f"{ours:.1f} s", f"{theirs:.1f} s", ours / theirs, goals[0])
            )
            found = rounds(started, 3 if quick else ROUNDS, do)
            for kind in ("eager", "compiled"):
                ours, theirs = found[f"peft_fx, {kind}"], found[f"peft, {kind}"]
                lines.append(Line(f"{model}: {do}, {kind}", ms(ours), ms(theirs), ratio(ours, theirs)))
            bare, theirs, ours = (best(found, f"{name},") for name in ("bare", "peft", "peft_fx"))
            lines.append(Line(f"{model}: {do}, best of both", ms(ours), ms(theirs), ratio(ours, theirs), goals[1]))
            cost = [statistics.median(values) - statistics.median(bare) for values in (ours, theirs)]
            over = cost[0] / cost[1] if cost[1] > 0 else float("nan")
            lines.append(Line(f"{model}: {do}, overhead over the bare model", *(f"{1e3 * c:.1f} ms" for c in cost),
                              over, goals[2]))  # fmt: skip
    return lines


def depth(quick: bool) -> list[Line]:
    """What ten layers and thirty cost, ours alone: ratio of the second to the first."""
    lines, cold = [], {}
    for layers in (10, 30):
        with workers(it=dict(library="peft_fx", compiler="peft_fx", model="", layers=layers)) as started:
            started["it"]("compile")
            cold[layers] = started["it"].captured, started["it"]("inference")
    for i, what in enumerate(("capture", "cold compile, inference")):
        ten, thirty = cold[10][i], cold[30][i]
        lines.append(Line(f"{what}: 30 layers over 10", f"{thirty:.1f} s", f"{ten:.1f} s", thirty / ten, 1.5))
    return lines


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> config, goal, whether both are compiled too: it takes PEFT minutes, and is left out where eager steps show enough
METHODS = {
    "DoRA": ({"peft_type": "LORA", "r": 16, "use_dora": True}, 0.75, True),
    "LoHa": ({"peft_type": "LOHA"}, 0.75, False),
    "BOFT": ({"peft_type": "BOFT", "boft_block_size": 4}, 0.75, False),
    "HRA": ({"peft_type": "HRA", "r": 8}, 0.75, False),
    "OFT": ({"peft_type": "OFT"}, 0.95, True),
    "VeRA": ({"peft_type": "VERA"}, 0.95, True),
    "FourierFT": ({"peft_type": "FOURIERFT"}, 0.95, False),
}


def methods(model: str, quick: bool) -> list[Line]:
    """Training steps of further methods."""
    lines = []
    for name, (config, goal, compiled) in METHODS.items():
        options = dict(model=model, config={**config, "target_modules": LAYERS})
        ours, theirs = against_peft(1 if quick else 3, compiled, "training", options)
        way = "best of both" if compiled else "eager"
        lines.append(Line(f"{model}: training step of {name}, {way}", ms(ours), ms(theirs), ratio(ours, theirs), goal))
    return lines


def memory(model: str, quick: bool) -> list[Line]:
    ours, theirs = against_peft(1 if quick else 3, True, "training", dict(model=model, dtype="bfloat16"),
                                batch=4, length=256, peak=True)  # fmt: skip
    shown = (f"{statistics.median(v) / 2**20:.0f} MiB" for v in (ours, theirs))
    return [
        Line(f"{model}: peak memory of a training step, bf16, 4 x 256, best of both", *shown, ratio(ours, theirs), 0.90)
    ]


# what -> what the contenders do, goal
CALLS = {
    "inference": (dict(do="inference"), 1.05),
    "generate, 16 tokens": (dict(do="generate"), 1.05),
    "training": (dict(do="training"), 1.05),
    "peak memory of a training step": (dict(do="training", peak=True), 1.05),
}


def face(model: str, quick: bool) -> list[Line]:
    """get_peft_model of both, not compiled: how long until the first call is done, in a process of its own, and later calls."""
    kinds = {name: dict(library=name, compiler=None, model=model) for name in ("face", "peft")}
    lines = []
    with workers(**kinds) as started:
        ours, theirs = started["face"].made, started["peft"].made
        lines.append(Line(f"{model}: get_peft_model", *(f"{1e3 * t:.0f} ms" for t in (ours, theirs)), ours / theirs))
        for do in ("inference", "generate", "training"):
            ours, theirs = (started[name](do) for name in kinds)
            lines.append(Line(f"{model}: first {do}", *(f"{1e3 * t:.0f} ms" for t in (ours, theirs)), ours / theirs))
        for what, (asked, goal) in CALLS.items():
            found = rounds(started, 3 if quick else ROUNDS, **asked)
            ours, theirs = found["face"], found["peft"]
            shown = (f"{statistics.median(v) / 2**20:.0f} MiB" if "peak" in asked else ms(v) for v in (ours, theirs))
            lines.append(Line(f"{model}: {what}", *shown, ratio(ours, theirs), goal))
    return lines


def parts(quick: bool) -> dict[str, Callable[[], list[Line]]]:
    models = ["2 x 1024 Llama"] if quick else ["SmolLM2-135M", "2 x 1024 Llama"]
    chosen = {f"steady {m}": lambda m=m: steady(m, quick) for m in models}
    chosen |= {"depth": lambda: depth(quick), "methods": lambda: methods(models[0], quick),
               "face": lambda: face(models[0], quick),
               "memory": lambda: memory(models[0], quick), "verbs": lambda: lines_of(verb_rows(quick)),
               "packed": lambda: packed(models[0], quick)}  # fmt: skip
    return chosen


def lines_of(rows: Iterable[tuple[str, list[float], list[float], float | None]]) -> list[Line]:
    return [Line(name, ms(ours), ms(theirs), ratio(ours, theirs), goal) for name, ours, theirs, goal in rows]


def packed(model: str, quick: bool) -> list[Line]:
    """Over nf4 layers of bitsandbytes: QLoRA's step under both faces, then what `packed_bench.py` has."""
    kinds = {name: dict(library=name, compiler=None, model=model, packed=True) for name in ("face", "peft")}
    lines = []
    with workers(**kinds) as started:
        for what, (asked, goal) in {
            "a QLoRA step, 2 x 64": (dict(do="training"), None),
            "peak memory of a QLoRA step, 4 x 256": (dict(do="training", batch=4, length=256, peak=True), 0.9),
        }.items():
            found = rounds(started, 1 if quick else 3, **asked)
            ours, theirs = found["face"], found["peft"]
            shown = (f"{statistics.median(v) / 2**20:.0f} MiB" if "peak" in asked else ms(v) for v in (ours, theirs))
            lines.append(Line(f"{model}: {what}", *shown, ratio(ours, theirs), goal))
    return lines + lines_of(packed_rows(quick))


def table_of(title: str, lines: list[Line]) -> Table:
    table = Table(title=title)
    for column in ("", "peft_fx", "PEFT", "ratio", "goal"):
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        met = line.goal is None or line.ratio <= line.goal
        goal = "" if line.goal is None else f"{line.goal:.2f}{'' if met else ' missed'}"
        table.add_row(line.name, line.ours, line.theirs, f"{line.ratio:.2f}", goal)
    return table


def write(tables: dict[str, Table]) -> None:
    """Puts the tables below what people have written in docs/benchmarks.md, in place of those of the same parts."""
    said, _, figures = FILE.read_text(encoding="utf-8").partition(MARK)
    sections = dict(section.split("\n", 1) for section in figures.split("\n### ")[1:])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    made_with = f"torch {torch.__version__}, PEFT {peft.__version__}; {machine}; Python {platform.python_version()}"
    for name, table in tables.items():
        page = Console(width=120, file=io.StringIO())
        page.print(table)
        sections[name] = f"\n{made_with}; {date.today()}\n\n```\n{page.file.getvalue()}```\n"
    text = "".join(f"\n### {name}\n{section}" for name, section in sections.items())
    FILE.write_text(f"{said.rstrip()}\n\n{MARK}\n{text}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds; writes nothing")
    parser.add_argument("--only", nargs="*", metavar="PART", help="some parts alone")
    options = parser.parse_args()
    chosen = parts(options.quick)
    if unknown := [name for name in options.only or () if name not in chosen]:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(chosen)}")
    tables = {}
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(options.only or list(chosen)):
            tables[name] = table_of(name, chosen[name]())
            console.print(tables[name])
    if not options.quick:
        write(tables)


if __name__ == "__main__":
    main()
