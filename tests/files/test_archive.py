"""`.pt2` files from strangers, which torch would run code from, and disks that are full when one is written."""

import contextlib
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from harm import ended, limit, small_disk, started
from torch import nn
from typer.testing import CliRunner

import peft_fx
from peft_fx.cli import app
from peft_fx.errors import AdapterFileError
from peft_fx.files.archive import is_arithmetic


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x) * x.shape[0]


def exported(path):
    torch.manual_seed(0)
    config = peft_fx.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    peft_fx.export(peft_fx.apply(peft_fx.capture(Scaled().eval(), (torch.randn(2, 6),)), config), path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Record -> bytes of a file that is read."""
    path = tmp_path_factory.mktemp("sound") / "model.pt2"
    exported(path)
    peft_fx.load(path)
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


class Code:
    """A pickle that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_pickle(path):
    buffer = io.BytesIO()
    torch.save((Code(path),), buffer)
    return buffer.getvalue()


def with_constant(records, name, entry):
    config = {"config": {"x": {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": entry}}}
    records["data/constants/model_constants_config.json"] = json.dumps(config).encode()


def opaque_constant(records, path):
    with_constant(records, "opaque_obj_0", None)
    records["data/constants/opaque_obj_0"] = pickle.dumps(Code(path))


def opaque_constant_that_is_called_a_tensor(records, path):
    """torch goes by the beginning of its name alone."""
    weights = json.loads(records["data/weights/model_weights_config.json"])["config"]
    name, data = "opaque_obj_0/../tensor_0", pickle.dumps(Code(path))
    entry = {**next(iter(weights.values())), "path_name": name, "is_param": False}
    records["data/constants/model_constants_config.json"] = json.dumps({"config": {"x": entry}}).encode()
    records[f"data/constants/{name}"] = data + bytes(-len(data) % 4)


def pickled_constant(records, path):
    with_constant(records, "tensor_0", None)
    records["data/constants/tensor_0"] = torch_pickle(path)


def pickled_weight(records, path):
    config = json.loads(records["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["use_pickle"] = True
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    records["data/weights/weight_0"] = torch_pickle(path)


def weights_of_an_older_version(records, path):
    records["data/weights/model.pt"] = torch_pickle(path)


def constants_of_an_older_version(records, path):
    records["data/constants/model.pt"] = torch_pickle(path)


def example_inputs(records, path):
    records["data/sample_inputs/model.pt"] = torch_pickle(path)


def size_that_is_code(records, path):
    program = json.loads(records["models/model.json"])
    text = json.dumps(program)
    first = text.index('"expr_str": "') + len('"expr_str": "')
    code = f"__import__('os').mkdir('{path}')"
    records["models/model.json"] = (text[:first] + code + text[text.index('"', first) :]).encode()


def with_arguments(records, path, kind, context):
    """Their structure names a module, which is imported: here one that lies on Python's path."""
    module = f"evil_{kind.replace('.', '_')}"
    (path.parent / f"{module}.py").write_text(f"import os\nos.mkdir({str(path)!r})\n")
    spec = [1, {"type": kind, "context": context(module), "children_spec": []}]
    program = json.loads(records["models/model.json"])
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)
    records["models/model.json"] = json.dumps(program).encode()


def enum_in_the_arguments(records, path):
    enum = {"__enum__": True, "name": "x"}
    with_arguments(records, path, "builtins.dict", lambda name: json.dumps([enum | {"fqn": f"{name}:X"}]))


def factory_in_the_arguments(records, path):
    factory = {"default_factory_name": "x", "dict_context": []}
    with_arguments(records, path, "collections.defaultdict", lambda name: factory | {"default_factory_module": name})


def program_of_an_older_version_beside(records, path):
    records["archive_version"] = b"x"  # torch gives up on this one with a RuntimeError, and looks beside it
    records["models/model.json"], records["../version"] = b"{}", b"8.8"
    records["../serialized_exported_program.json"] = b"{}"
    records["../serialized_state_dict.pt"] = records["../serialized_constants.pt"] = torch_pickle(path)


ATTACKS = [
    opaque_constant, pickled_constant, pickled_weight, weights_of_an_older_version, constants_of_an_older_version,
    example_inputs, size_that_is_code, enum_in_the_arguments, factory_in_the_arguments, opaque_constant_that_is_called_a_tensor,
]  # fmt: skip


def archive_of(records, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.removeprefix("../") if name.startswith("../") else f"model/{name}", data)
    return path


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_code_in_a_file_is_refused_and_not_run(sound, tmp_path, monkeypatch, attack):
    monkeypatch.syspath_prepend(tmp_path)
    records, made = dict(sound), tmp_path / "executed"
    attack(records, made)
    evil = archive_of(records, tmp_path / "evil.pt2")
    for read in (peft_fx.load, peft_fx.load_package):
        with pytest.raises(AdapterFileError, match="evil.pt2: .* runs code of its author's when it is loaded"):
            read(evil)
    result = CliRunner().invoke(app, ["inspect", str(evil)])
    assert result.exit_code and not made.exists()
    with contextlib.suppress(Exception):
        torch.export.load(str(evil))
    assert made.exists(), "torch does not run it: no attack"


def test_files_beside_a_program_are_refused(sound, tmp_path):
    """torch takes them for a program of an older version where it cannot read the other."""
    records = dict(sound)
    program_of_an_older_version_beside(records, tmp_path / "executed")
    with pytest.raises(AdapterFileError, match="has files beside its program"):
        peft_fx.load(archive_of(records, tmp_path / "evil.pt2"))
    assert not (tmp_path / "executed").exists()


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(sound, tmp_path):
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**sound, "data/weights/weight_0": bytes(2**24)}.items():
            archive.writestr(f"model/{name}", data)
    with pytest.raises(AdapterFileError, match="that unpack to"):
        peft_fx.load(path)


SIZES = {
    "Symbol('s0', positive=True, integer=True)": True,
    "Add(Mul(Integer(2), Symbol('s0')), Integer(-1))": True,
    "Max(1, s0//2) + Mod(s1, 8) - 2**s0": True,
    "Float('0.5', precision=53)": True,
    "s0 < 3": True,
    "s0.__class__": False,
    "Symbol('s0').subs(1, 2)": False,
    "exec(chr(49))": False,
    "Symbol('__import__(1)')": False,
    "(lambda: 0)()": False,
    "[print for x in (1,)]": False,
    "f'{s0}'": False,
    "Max(*s0)": False,
    "1 if s0 else 2": False,
    "a b": False,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_arithmetic(text):
    assert is_arithmetic(text) == SIZES[text]


# Full disks, on which torch's writer would end the process


def refused(path, size=None):
    """Exports where there is no space for it."""
    if size is not None:
        limit(size)
    with pytest.raises(AdapterFileError, match="cannot be written, nothing has changed"):
        exported(path)


def test_a_file_that_may_not_get_so_large_is_an_error_and_the_old_one_stays(tmp_path):
    (tmp_path / "model.pt2").write_text("old")
    assert ended(started(refused, tmp_path / "model.pt2", 2000)) == 0
    assert (tmp_path / "model.pt2").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.slow
def test_export_to_a_full_disk_is_an_error(tmp_path):
    with small_disk(tmp_path, 64):
        (tmp_path / "filler").write_bytes(bytes(2**15 + 2**14))
        assert ended(started(refused, tmp_path / "model.pt2")) == 0
        assert [p.name for p in tmp_path.iterdir()] == ["filler"]
