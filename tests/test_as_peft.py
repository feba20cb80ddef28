"""`as_peft`: libraries and scripts that import `peft` run on peft_fx, with PEFT installed and without; undone, all is as before."""

import ast
import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from graphs import inputs, model_of
from journeys import TOGETHER
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import peft_fx
from peft_fx.hf.compat.submodules import SUBMODULES
from peft_fx.hf.ecosystem import version

HERE = Path(__file__).parent
LORA = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
THEIRS = {"get": get_peft_model, "inject": inject_adapter_in_model}


def python(*arguments, **environment):
    """A fresh process, offline."""
    places = os.pathsep.join(filter(None, (environment.pop("PYTHONPATH", ""), str(HERE))))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": places} | environment
    run = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


# Journeys


@pytest.mark.slow
@pytest.mark.parametrize("library", TOGETHER)
def test_scripts_for_a_library_give_pefts_numbers(library, tmp_path):
    pytest.importorskip(library)
    ways = ["peft", "installed", *["late"] * (library == "trl"), "hidden"]
    for who in ways:
        python(HERE / "journeys.py", library, who, tmp_path)
    expected, *others = (json.loads((tmp_path / f"{who}.json").read_text()) for who in ways)
    for who, other in zip(ways[1:], others, strict=True):
        assert other["peft"] == (None if who == "hidden" else expected["peft"])
        assert other["found"].keys() == expected["found"].keys()
        for name, numbers in expected["found"].items():
            assert numbers and other["found"][name] == pytest.approx(numbers, rel=1e-5, abs=1e-5), name


# With PEFT installed


@pytest.fixture
def standing():
    with peft_fx.as_peft() as handle:
        yield handle


def test_names_bound_before_lead_here_and_undone_they_do_not():
    before = {
        name: vars(sys.modules[name]).copy()
        for name in (__name__, "peft", "peft.utils.save_and_load", "peft.peft_model")
    }
    tables = [dict(t) for t in (peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)]
    bases, finders = peft_fx.LoraConfig.__bases__, list(sys.meta_path)
    handle = peft_fx.as_peft()
    assert peft_fx.as_peft() is handle
    assert isinstance(get_peft_model(model_of("tied_llama"), LoraConfig(**LORA)), peft_fx.PeftModel)
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA]
    assert type(tuner(model_of("tied_llama"), {"default": LoraConfig(**LORA)}, "default")) is peft_fx.LoraModel
    handle.undo()
    handle.undo()
    for name, names in before.items():
        now = vars(sys.modules[name])
        assert [n for n, value in names.items() if now[n] is not value] == []
    assert get_peft_model is THEIRS["get"] and inject_adapter_in_model is THEIRS["inject"]
    assert tables == [peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING]
    assert peft_fx.LoraConfig.__bases__ == bases and sys.meta_path == finders
    back = get_peft_model(model_of("tied_llama"), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    assert type(back) is peft.PeftModelForCausalLM and not isinstance(back, peft_fx.PeftModel)
    assert not isinstance(peft_fx.LoraConfig(), peft.PeftConfig)


MAKE = {
    "get_peft_model": lambda config, folder: get_peft_model(model_of("tied_llama"), config),
    "peft.get_peft_model, mixed": lambda config, folder: peft.get_peft_model(
        model_of("tied_llama"), config, mixed=True
    ),
    "PeftModel": lambda config, folder: peft.PeftModel(model_of("tied_llama"), config),
    "PeftModelForCausalLM": lambda config, folder: peft.PeftModelForCausalLM(model_of("tied_llama"), config, "default"),
    "from_pretrained": lambda config, folder: peft.PeftModel.from_pretrained(model_of("tied_llama"), folder),
    "with a config": lambda config, folder: peft.PeftModel.from_pretrained(
        model_of("tied_llama"), folder, config=config
    ),
}


@pytest.mark.parametrize("way", MAKE)
def test_every_way_to_a_model_gives_one_of_ours(way, tmp_path, standing):
    get_peft_model(model_of("tied_llama"), LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    for config in (LoraConfig(**LORA, task_type="CAUSAL_LM"), peft_fx.LoraConfig(**LORA, task_type="CAUSAL_LM")):
        made = MAKE[way](config, str(tmp_path))
        assert isinstance(made, peft_fx.PeftModel) and isinstance(made, peft.PeftModel)
        found = made.peft_config["default"]
        assert isinstance(found, peft.LoraConfig) and isinstance(found, peft_fx.LoraConfig)
        made(**inputs("tied_llama"))


def test_injection_and_the_functions_around_it(standing):
    model = peft.inject_adapter_in_model(LoraConfig(**LORA), model_of("tied_llama"))
    assert isinstance(model.model.layers[0].mlp.down_proj, peft.tuners.tuners_utils.BaseTunerLayer)
    tensors = peft.get_peft_model_state_dict(model)
    assert {k.rpartition(".lora_")[0].rpartition(".")[2] for k in tensors} == {"q_proj", "down_proj"}
    again = peft.inject_adapter_in_model(LoraConfig(**LORA), model_of("tied_llama"), state_dict=tensors)
    assert not peft.set_peft_model_state_dict(again, tensors).unexpected_keys
    assert peft.get_model_status(again).num_adapter_layers == 2
    assert type(model.model.layers[0].mlp.down_proj).__mro__.index(nn.Linear) > 0


def test_what_there_is_not_here_stays_pefts_own(standing):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    prompted = get_peft_model(model_of("tied_llama"), config)
    assert type(prompted) is peft.PeftModelForCausalLM and type(copy.deepcopy(prompted)) is type(prompted)


def test_what_peft_adapted_before_stays_pefts_own(tmp_path):
    before = get_peft_model(model_of("tied_llama").eval(), LoraConfig(**LORA))
    expected = before(**inputs("tied_llama")).logits
    with peft_fx.as_peft():
        before.add_adapter("more", LoraConfig(**LORA))
        before.save_pretrained(tmp_path)
        assert peft.get_peft_model_state_dict(before).keys()
        ours = peft.PeftModel.from_pretrained(model_of("tied_llama").eval(), tmp_path)
        assert isinstance(ours, peft_fx.PeftModel)
        assert (ours(**inputs("tied_llama")).logits - expected).abs().max() < 1e-5


def test_a_class_that_somebody_derived_of_pefts_stays_pefts_own(standing, tmp_path):
    class Mine(peft.PeftModelForCausalLM):
        pass

    made = Mine(model_of("tied_llama"), LoraConfig(**LORA))
    made.add_adapter("more", LoraConfig(**LORA))
    made.save_pretrained(tmp_path)
    back = Mine.from_pretrained(model_of("tied_llama"), tmp_path)
    assert type(made) is type(back) is Mine and type(back.base_model).__mro__[1] is peft.LoraModel


def test_configs_are_copied_and_compared_as_before(standing):
    config = peft_fx.IA3Config(target_modules=["q_proj"])
    assert copy.deepcopy(config) == dataclasses.replace(config) == config
    assert type(dataclasses.replace(config)) is peft_fx.IA3Config


def test_an_error_on_the_way_changes_nothing(monkeypatch):
    finders = list(sys.meta_path)
    monkeypatch.setattr("peft_fx.hf.ecosystem.installed.lead_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peft_fx.as_peft()
    assert peft.get_peft_model is THEIRS["get"] and sys.meta_path == finders


# Its version


@pytest.mark.parametrize(("there", "asked", "answer"), [
    ("0.21.2", ["0.20.0", "0.17.0"], "0.21.2"),
    ("0.21.2", ["0.22.0"], "0.22.0"),
    ("0.9.0", ["0.17.0", "0.20.0"], "0.20.0"),
    (None, [], "0.21.2"),
    (None, ["0.22.0"], "0.22.0"),
])  # fmt: skip
def test_the_version_satisfies_what_is_asked(there, asked, answer, monkeypatch):
    for module in (version, importlib.import_module("peft_fx.hf.ecosystem.as_peft")):
        monkeypatch.setattr(module, "installed", lambda: there)
    monkeypatch.setattr(version, "asked", lambda: asked)
    with peft_fx.as_peft() as handle:
        assert importlib.metadata.version("peft") == answer == handle.version
    assert importlib.metadata.version("peft") == peft.__version__


def test_what_the_installed_libraries_ask_for_is_found():
    from transformers.integrations.peft import MIN_PEFT_VERSION

    assert MIN_PEFT_VERSION in version.asked()


# Without PEFT

HIDE = "import sys, journeys; from importlib.machinery import PathFinder; sys.meta_path[:] = " \
       "[journeys.WithoutPeft if f is PathFinder else f for f in sys.meta_path]\n"  # fmt: skip

WITHOUT = {
    "found, and gone when undone": """
        import importlib.metadata, importlib.util, peft_fx
        handle = peft_fx.as_peft()
        from transformers.utils import is_peft_available
        import peft, peft.tuners.lora
        from peft.utils import get_peft_model_state_dict
        assert importlib.util.find_spec("peft") and is_peft_available()
        assert importlib.metadata.version("peft") == peft.__version__ == handle.version
        assert peft.LoraConfig is peft.tuners.lora.LoraConfig is peft_fx.LoraConfig
        handle.undo()
        assert importlib.util.find_spec("peft") is None and not is_peft_available()
        assert not [name for name in sys.modules if name.partition(".")[0] == "peft"]
        try:
            importlib.metadata.version("peft")
        except importlib.metadata.PackageNotFoundError:
            print("ok")
    """,
    "a config of a method that is missing can be asked for, not made": """
        import peft_fx
        peft_fx.as_peft()
        from peft import LoraConfig, PeftConfig, PrefixTuningConfig
        assert issubclass(PrefixTuningConfig, PeftConfig) and not isinstance(LoraConfig(), PrefixTuningConfig)
        try:
            PrefixTuningConfig(num_virtual_tokens=2)
        except NotImplementedError as error:
            assert "not in this version yet" in str(error)
            print("ok")
    """,
    "too late is refused, by name": """
        import peft_fx, transformers.trainer
        try:
            peft_fx.as_peft()
        except ImportError as error:
            assert "transformers.trainer" in str(error) and "before" in str(error) and "peft" not in sys.modules
            print("ok")
    """,
    "nothing is imported by it": """
        import peft_fx
        peft_fx.as_peft()
        assert "torch" not in sys.modules
        print("ok")
    """,
}


@pytest.mark.parametrize("what", WITHOUT)
def test_without_peft(what):
    lines = [line[8:] for line in WITHOUT[what].splitlines()]
    assert python("-c", HIDE + "\n".join(lines)) == "ok\n"


# Entries

SCRIPT = """
import sys
from peft import get_peft_model
print(get_peft_model.__module__ , hasattr(get_peft_model, "__wrapped__"), sys.argv[1:])
"""


def test_a_script_is_run_with_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    expected = "peft.mapping_func True ['--r', '8']\n"
    assert python("-m", "peft_fx", tmp_path / "script.py", "--r", "8") == expected
    assert python("-m", "peft_fx", "-m", "script", "--r", "8", PYTHONPATH=str(tmp_path)) == expected


def test_a_line_of_sitecustomize_reads_the_environment(tmp_path):
    page = (HERE.parent / "docs" / "ecosystem.md").read_text()
    line = page.partition("```python\n# sitecustomize.py\n")[2].partition("```")[0]
    (tmp_path / "sitecustomize.py").write_text(line)
    (tmp_path / "script.py").write_text(SCRIPT)
    for value, led in (("1", True), ("0", False)):
        found = python(tmp_path / "script.py", PYTHONPATH=str(tmp_path), PEFT_FX=value)
        assert found == f"peft.mapping_func {led} []\n"


# What libraries import from PEFT

# module of PEFT's -> names that they take from it and there are not here, and why that is no harm
NOT_HERE = {
    "peft.utils._get_submodules": "to take PEFT's layers out: as_peft has its own way for diffusers",
    "peft.utils.transformers_weight_conversion.build_peft_weight_mapping": "to load into PEFT's layers: so has it for transformers",
}


def imported_names(package):
    """What a library's files import from PEFT."""
    for folder in importlib.util.find_spec(package).submodule_search_locations:
        for path in Path(folder).rglob("*.py"):
            if "from peft" in (text := path.read_text(encoding="utf-8")):
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft":
                        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ["accelerate", "diffusers", "sentence_transformers", "transformers", "trl"])
def test_names_that_libraries_import_are_here(package):
    pytest.importorskip(package)
    missing = set()
    for name in set(imported_names(package)):
        module, _, attribute = name.rpartition(".")
        below = module.partition(".")[2]
        here = (below in SUBMODULES or not below) and hasattr(
            importlib.import_module(f"peft_fx.{below}".rstrip(".")), attribute
        )
        if not here and attribute not in peft_fx.missing.NAMES:
            missing.add(name)
    assert missing <= NOT_HERE.keys()
