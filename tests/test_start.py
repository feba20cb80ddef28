"""What is imported when: names come when they are asked for, and what saved graphs call is there as soon as torch is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_fx

ROOT = Path(peft_fx.__file__).parent
HEAVY = "torch transformers sympy rich.progress"
COMMAND = "import sys; sys.argv = ['peft-fx', {}]\nfrom peft_fx.cli import main\ntry: main()\nexcept SystemExit: pass\n"
CONFIG = '{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}'
IMPORTS = {  # code -> what it must not import
    "import peft_fx": HEAVY + " typer yaml",
    "import peft_fx; dir(peft_fx); peft_fx.LoraConfig": "transformers sympy",
    "import peft_fx.utils, peft_fx.hf; from peft_fx import errors; peft_fx.PeftFxError": HEAVY,
    "import peft_fx; peft_fx.Recipe": HEAVY,
    "import torch, peft_fx": "transformers sympy torch._dynamo",
    "import peft_fx; peft_fx.capture, peft_fx.apply": "transformers torch._dynamo",
    COMMAND.format("'--version'"): HEAVY,
    COMMAND.format("'--help'"): HEAVY,
    COMMAND.format("'inspect', '--help'"): HEAVY,
    COMMAND.format("'methods', 'lora'"): "transformers.modeling_utils",
    COMMAND.format("'inspect', 'graph.pt2'"): "transformers.modeling_utils",
    f"open('config.json', 'w').write({CONFIG!r})\n"
    + COMMAND.format("'inspect', 'config.json'"): "peft_fx.verbs.capture.model peft_fx.engine torch.export.pt2_archive",
}


def python(code: str, folder: Path = ROOT.parent) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", IMPORTS)
def test_nothing_is_imported_that_is_not_needed(code, tmp_path):
    found = python(f"{code}\nimport sys; print(*set({IMPORTS[code].split()}) & set(sys.modules))", tmp_path)
    assert not found.splitlines()[-1]


def test_the_command_leaves_no_work_to_garbage_collection():
    command = COMMAND.format("'--version'")
    found = python(f"{command}\nimport gc; print(gc.isenabled(), gc.get_freeze_count() > 0)")
    assert found.splitlines()[-1] == "False True"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import peft_fx, torch",
        "import torch, peft_fx",
        "import peft_fx.errors, torch.nn",
        "import peft_fx.kernels.stacking, torch",
    ],
)
def test_torch_reads_a_saved_graph_after_any_order_of_imports(imports, tmp_path):
    graph = peft_fx.capture(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))
    tuned = peft_fx.apply(graph, {"peft_type": "HRA", "r": 2, "target_modules": ["0"]}, lowering="activation").eval()
    program = peft_fx.export(tuned, tmp_path / "graph.pt2")
    assert any("peft_fx" in str(n.target) for n in program.graph.nodes if n.op == "call_function")
    x = torch.randn(3, 4)
    torch.save(x, tmp_path / "x.pt")
    found = python(f"{imports}; print(torch.export.load('graph.pt2').module()(torch.load('x.pt')).tolist())", tmp_path)
    torch.testing.assert_close(torch.tensor(ast.literal_eval(found)), tuned(x))


def test_the_names_are_what_type_checkers_read_and_every_one_is_there():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {alias.name: node.module for node in block.body for alias in node.names}
    listed = {name: place for name, place in peft_fx._PLACES.items() if place != "hf.model.tuners"}
    assert read == listed and set(peft_fx.__all__) <= listed.keys()
    for name in dir(peft_fx):
        assert getattr(peft_fx, name) is not None


def test_completion_lists_public_names_alone():
    names = dir(peft_fx)
    assert {"capture", "LoraConfig", "LoraModel", "PeftModel", "utils", "tuners"} <= set(names)
    assert not {n for n in names if n.startswith("_")} | (
        {"annotations", "sys", "store", "METHODS", "verbs"} & set(names)
    )


def test_a_name_that_there_is_not_is_an_attribute_error_that_python_can_mend():
    with pytest.raises(AttributeError, match="module 'peft_fx' has no attribute 'aply'") as info:
        peft_fx.aply  # noqa: B018
    assert info.value.name == "aply" and info.value.obj is peft_fx
    assert (
        not hasattr(peft_fx, "__wrapped__") and peft_fx.store.tensors.ROOT == "peft_fx"
    )  # its own modules are found too
