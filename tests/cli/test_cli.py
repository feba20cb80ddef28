"""`peft-fx inspect`: what it opens, what each format says, and that every mistake is one line with exit code 2."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
from typer.testing import CliRunner

import peft_fx
from peft_fx.cli import app
from peft_fx.cli.model import build, config_of
from peft_fx.verbs.rows import Row, folded, unfolded

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
TARGET = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of everything that can be named on the command line, by name."""
    root = tmp_path_factory.mktemp("cli")
    model = tiny.build("llama").eval()
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(root / "model")
    model.config.save_pretrained(root / "config_only")
    for name in ("tied_llama", "mixtral", "gpt2"):
        other = tiny.build(name)
        other.config.architectures = [type(other).__name__] if name != "gpt2" else None
        other.config.save_pretrained(root / name)
    graph = peft_fx.capture(model)
    tuned = peft_fx.apply(graph, LORA | {"init_lora_weights": False})
    peft_fx.save_adapter(tuned, root / "adapter")
    for name, g in {"base": graph, "tuned": tuned, "merged": peft_fx.merge(tuned)}.items():
        peft_fx.export(g, root / f"{name}.pt2")
    (root / "recipe.json").write_text(json.dumps(LORA))
    (root / "recipe.yaml").write_text("peft_type: LORA\nr: 2\ntarget_modules: [q_proj, v_proj]\n")
    (root / "damaged.json").write_text("{")
    (root / "hostile").mkdir()
    (root / "hostile" / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}})
    )
    (root / "hostile" / "evil.py").write_text(f"open({str(root / 'executed')!r}, 'w')\n")
    (root / "wrong").mkdir()
    (root / "wrong" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "x"}))
    (root / "empty").mkdir()
    return SimpleNamespace(root=root, graph=tuned, **{p.name.replace(".", "_"): str(p) for p in root.iterdir()})


def invoke(*arguments, **environment):
    return CliRunner(env={"COLUMNS": "140", **environment}).invoke(app, ["inspect", *arguments])


def shown(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def inspected(*arguments) -> dict:
    return json.loads(shown(*arguments, "--format", "json"))


# What is opened


SOURCES = ["{model}", "{config_only}", "{config_only}/config.json", "{base_pt2}"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_lists_the_same_possible_targets(files, source):
    found = inspected(source.format(**vars(files)))
    assert {t["status"] for t in found["targets"]} == {"possible"}
    assert [t["target"] for t in found["targets"]] == [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{p}.weight" for i in (0, 1) for p in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        "lm_head.weight",
    ]  # fmt: skip
    assert found["model"]["name"] == "LlamaForCausalLM"
    assert found["model"]["parameters"] == sum(p.numel() for p in tiny.build("llama").parameters())
    assert found["model"]["weights"] is (source == "{base_pt2}")


@pytest.mark.parametrize("arguments", [[], ["--all"], ["--format", "json"]])
def test_a_list_of_possible_targets_takes_no_graph(files, monkeypatch, arguments):
    monkeypatch.setattr("peft_fx.verbs.capture.model.capture", lambda model: 1 / 0)
    text = shown(files.config_only, *arguments)
    assert "nodes" not in text or json.loads(text)["totals"]["nodes_before"] is None
    if arguments == ["--format", "json"]:
        found = json.loads(text)
        assert found["passes"] == [] and found["model"]["mode"] is None and found["target"] is None
        assert {(t["lowering"], t["reason"]) for t in found["targets"]} == {("", "")}


@pytest.mark.slow
def test_a_graph_that_is_asked_for_is_drawn_whole(files):
    lines = shown(files.config_only, "--format", "code").splitlines()
    assert any("aten.embedding" in line for line in lines) and lines[-1].lstrip().startswith("return ")


def test_a_config_file_is_a_model(files):
    assert inspected(f"{files.config_only}/config.json")["model"]["dtypes"] == ["float32"]


BUILT = {
    "config_only": "LlamaForCausalLM",
    "tied_llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}  # gpt2 names none


@pytest.mark.parametrize("name", BUILT)
def test_a_config_is_built_without_memory(files, name):
    model = build(config_of(getattr(files, name), name), name)
    expected = tiny.build("llama" if name == "config_only" else name)
    assert type(model).__name__ == BUILT[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.slow
def test_experts_are_possible_targets(files):
    kinds = {t["target"]: t["kind"] for t in inspected(files.mixtral)["targets"]}
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] == "expert"


@pytest.mark.parametrize(("file", "status"), [("tuned_pt2", "active"), ("merged_pt2", "merged")])
def test_a_file_shows_the_adapters_in_it(files, file, status):
    found = inspected(getattr(files, file))
    assert [t["status"] for t in found["targets"]] == [status] * 4
    assert all((t["rounding_error"] is not None) == (status == "merged") for t in found["targets"])
    assert found["totals"]["parameters_added"] == (4 * 64 if status == "active" else 0)


def test_code_beside_a_config_is_not_run(files):
    result = invoke(files.hostile)
    assert result.exit_code == 2
    assert not (files.root / "executed").exists()


# What is applied


RECIPES = ("recipe_json", "recipe_yaml", "inline", "adapter")


@pytest.mark.parametrize("form", RECIPES)
def test_every_form_of_recipe_gives_the_same_plan(files, form):
    option = "--adapter" if form == "adapter" else "--recipe"
    found = inspected(files.base_pt2, option, json.dumps(LORA) if form == "inline" else getattr(files, form))
    assert [t["target"] for t in found["targets"]] == [
        f"model.layers.{i}.self_attn.{p}.weight" for i in (0, 1) for p in ("q_proj", "v_proj")
    ]
    assert {(t["method"], t["lowering"], t["status"], t["parameters"]) for t in found["targets"]} == {
        ("LORA", "activation", "planned", 64)
    }
    assert found["totals"]["parameters_added"] == 4 * 64


def test_a_method_name_means_its_defaults(files):
    assert inspected(files.base_pt2, "--recipe", "lora")["totals"]["targets"] == 4


def test_the_plan_is_what_apply_does(files):
    planned = inspected(files.config_only, "--recipe", files.recipe_json)
    tuned = files.graph
    assert planned["totals"]["parameters_added"] == peft_fx.trainable_parameters(tuned).trainable
    report = tuned.meta["peft_fx"].reports[-1]
    assert planned["passes"][-1]["name"] == report.name == "Inject"
    assert planned["passes"][-1]["difference"] == report.op_difference


def test_passes_chain_from_one_operator_count_to_the_next(files):
    passes = inspected(files.base_pt2, "--recipe", "lora")["passes"]
    assert all(a["after"] == b["before"] for a, b in itertools.pairwise(passes))


def test_refused_and_unmatched_targets_hide_no_others(files):
    recipe = LORA | {"target_modules": ["q_proj", "input_layernorm", "q_prj"]}
    found = inspected(files.base_pt2, "--recipe", json.dumps(recipe))
    assert [t["status"] for t in found["targets"]] == ["planned", "planned", "refused", "refused", "unmatched"]
    text = shown(files.base_pt2, "--recipe", json.dumps(recipe))
    assert "model.layers.{0..1}.input_layernorm" in text
    assert "nearest: q_proj" in text


def test_an_adapter_is_planned_on_top_of_those_in_a_file(files):
    found = inspected(files.tuned_pt2, "--adapter", files.adapter)
    assert [(t["adapter"], t["status"]) for t in found["targets"]] == [("default", "active")] * 4 + [
        ("new", "planned")
    ] * 4


# How it is shown


def test_the_table_folds_repeated_layers_and_all_unfolds_them(files):
    assert "model.layers.{0..1}.self_attn.q_proj" in shown(files.base_pt2, "--recipe", "lora")
    assert "model.layers.1.self_attn.q_proj" in shown(files.base_pt2, "--recipe", "lora", "--all")


def test_a_piped_table_has_no_colours_and_fits_120_columns(files):
    result = CliRunner(env={"COLUMNS": None}).invoke(app, ["inspect", files.base_pt2, "--recipe", "lora"])
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize("pattern", ["layers.0.self_attn.q_proj", TARGET, r".*\.0\..*q_proj", "q_proj"])
def test_target_is_a_suffix_or_a_regex(files, pattern):
    assert inspected(files.tuned_pt2, "--target", pattern)["target"]["name"] == TARGET


def test_a_target_is_shown_before_and_after(files):
    view = inspected(files.base_pt2, "--recipe", files.recipe_json, "--target", "q_proj")["target"]
    assert view["matches"] == 2
    assert [n["target"] for n in view["before"]] == [TARGET, "aten.linear"]
    operators = [n["target"] for n in view["after"] if n["op"] == "call_function"]
    assert operators == ["aten.linear", "aten.linear", "aten.mul.Tensor", "aten.linear", "aten.add.Tensor"]
    assert [n["inserted"] for n in view["after"]] == [False, True, True, True, False, True, True, True, True]
    assert {n["tag"]["adapter"] for n in view["after"] if n["tag"].get("role")} == {"default"}
    shape = next(n["shape"] for n in view["after"] if n["target"].endswith("lora_A"))
    assert shape == [2, 16]


def test_code_marks_what_was_inserted(files):
    lines = shown(files.tuned_pt2, "--target", "layers.0.self_attn.q_proj", "--format", "code").splitlines()
    after = lines[lines.index("# after") + 1 :]
    assert any(line.startswith("  linear") and line.endswith("q_proj_weight)") for line in after)
    assert any(line.startswith("+ linear") and line.endswith("lora_A)") for line in after)
    assert not any(line.startswith("+") for line in lines[: lines.index("# after")])


def test_code_of_a_whole_graph_is_python(files):
    lines = shown(files.tuned_pt2, "--format", "code").replace("+ ", "  ").splitlines()
    compile("\n".join(["def forward(self, inputs):", *lines]), "graph", "exec")


def test_dot_is_a_graph_with_adapters_in_green(files):
    text = shown(files.tuned_pt2, "--target", "layers.0.self_attn.q_proj", "--format", "dot")
    assert text.startswith("digraph ")
    assert text.count("{") == text.count("}") == 3
    nodes = [line for line in text.splitlines() if "[label=" in line]
    assert len([line for line in nodes if "#d9f0dd" in line]) == 7
    assert all(line.endswith(";") for line in nodes)


def test_the_table_of_one_target_lists_its_nodes(files):
    text = shown(files.tuned_pt2, "--target", "layers.0.self_attn.q_proj")
    assert "before" in text and "after" in text
    assert "float32[2, 16]" in text


FOLDS = {
    "a.0.w": "a.0.w",
    "a.0.w a.1.w a.2.w": "a.{0..2}.w",
    "a.0.w a.2.w a.3.w": "a.{0,2..3}.w",
    "a.0.b.0 a.0.b.1 a.1.b.0 a.1.b.1": "a.{0..1}.b.{0..1}",
    "a.0.b.0 a.0.b.1 a.1.b.0": "a.0.b.{0..1} a.1.b.0",
    "a1.w a2.w": "a1.w a2.w",
    "a.0 a.0.0 a.1": "a.{0..1} a.0.0",
}


@pytest.mark.parametrize("names", FOLDS)
def test_groups_multiply_out_to_their_rows(names):
    rows = [Row("", n, "linear", (1, 1), "dense", "", "activation", 3, "planned", "") for n in names.split()]
    groups = folded(rows)
    assert " ".join(g.name for g in groups) == FOLDS[names]
    assert sum(g.count for g in groups) == len(unfolded(rows)) == len(rows)
    assert sum(g.parameters for g in groups) == 3 * len(rows)


# What is refused


ERRORS = {
    "no such path": (["./nowhere"], "no such file or folder"),
    "no such pt2": (["nowhere.pt2"], "no such file"),
    "folder without config": (["{empty}"], "has no config.json"),
    "adapter as model": (["{adapter}"], "is an adapter"),
    "config that is no JSON": (["{damaged_json}"], "no config"),
    "config of wrong types": (["{wrong}"], "no config"),
    "wrong kind of file": (["{recipe_yaml}"], "expected a .pt2"),
    "both": (["{config_only}", "--recipe", "lora", "--adapter", "{adapter}"], "exclude each other"),
    "unknown format": (["{config_only}", "--format", "xml"], "none of table, code, json, dot"),
    "unknown option": (["{config_only}", "--wat"], "--wat"),
    "no model": ([], "MODEL"),
    "unknown method": (["{config_only}", "--recipe", "lroa"], "neither a file, nor JSON, nor a method, which peft-fx methods lists; did you mean 'lora'?"),
    "misspelt option": (["{config_only}", "--adpter", "x"], "--adapter"),
    "option without its value": (["{config_only}", "--recipe"], "--recipe"),
    "one argument too many": (["{config_only}", "lora"], "lora"),
    "tensors as model": (["{adapter}/adapter_model.safetensors"], "expected a .pt2, a config.json, a model folder or a hub id"),
    "no path and no id": (["SmolLM2"], "no hub id of the form org/name"),
    "damaged recipe": (["{config_only}", "--recipe", "{damaged_json}"], "not valid json"),
    "damaged inline": (["{config_only}", "--recipe", "{{"], "not valid JSON"),
    "missing recipe": (["{config_only}", "--recipe", "nowhere.yaml"], "cannot be read"),
    "missing adapter": (["{config_only}", "--adapter", "./nowhere"], "no such folder"),
    "nothing to adapt": (
        ["{base_pt2}", "--recipe", '{{"peft_type": "LORA", "target_modules": ["q_prj"]}}'], "nearest: q_proj"),
    "no such target": (["{base_pt2}", "--target", "q_prj"], "nearest: q_proj"),
    "bad regex": (["{base_pt2}", "--target", "("], "no regular expression"),
    "merged": (["{merged_pt2}", "--adapter", "{adapter}"], "unmerge"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_with_exit_code_2(files, name):
    arguments, message = ERRORS[name]
    result = invoke(*(a.format(**vars(files)) for a in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("peft-fx: error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct", "x"], "inspect"),
        (["--verison"], "--version"),
        (["methods", "lora", "vera"], "vera"),
        (["methods", "lroa"], "lroa"),
    ],
)
def test_a_misspelt_command_is_one_line_with_exit_code_2(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("peft-fx: error: ") and message in line


def test_a_traceback_is_shown_on_request(files):
    result = invoke("./nowhere", PEFT_FX_TRACEBACK="1")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_a_fault_of_ours_is_one_line_too(files, monkeypatch):
    monkeypatch.setattr("peft_fx.cli.gathering.gather", lambda *a: 1 / 0)
    result = invoke(files.config_only)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "ZeroDivisionError" in line


# The script itself


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], []], ids=" ".join)
def test_help_names_every_option(arguments):
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, arguments)
    assert result.exit_code == 0
    expected = (
        ["--recipe", "--adapter", "--target", "--format", "--all"]
        if "inspect" in arguments
        else ["inspect", "--version"]
    )
    assert all(option in result.stdout for option in expected)


def test_version_is_the_packages():
    from importlib.metadata import version

    assert CliRunner().invoke(app, ["--version"]).stdout == f"peft-fx {version('peft-fx')}\n"


@pytest.mark.slow
def test_the_command_reads_a_file_in_a_process_of_its_own(files):
    command = [
        sys.executable,
        "-c",
        "from peft_fx.cli import main; main()",
        "inspect",
        files.tuned_pt2,
        "--format",
        "json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert json.loads(run.stdout)["totals"]["targets"] == 4
