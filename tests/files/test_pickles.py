"""Adapters in PEFT's older format: a small file takes no more memory than it has bytes, whatever it asks for."""

import pickle
import resource
import zipfile

import pytest
import torch
from harm import ended, started

from peft_fx.errors import AdapterFileError
from peft_fx.files import read_tensors

MEGABYTE = 2**20


def written(path, data, **options):
    torch.save(data, path, **options)
    return path


def repacked(path, change, compression=zipfile.ZIP_STORED):
    """The archive with `change(name, bytes)` in the place of each record."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def compressed(path):
    repacked(written(path, {"a": torch.zeros(32 * MEGABYTE)}), lambda _, data: data, zipfile.ZIP_DEFLATED)


def overlapping(path):
    """Many entries of the directory for the bytes of one record."""
    written(path, {"a": torch.zeros(MEGABYTE)})
    with zipfile.ZipFile(path, "a") as archive:
        one = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
        for _ in range(30):
            archive.filelist.append(one)
        archive._didModify = True


class Bytes:
    def __reduce__(self):
        return bytearray, (128 * MEGABYTE,)


class Numbers:
    def __reduce__(self):
        return torch.Tensor, (32 * MEGABYTE,)


def a_number_of_bytes(path):
    written(path, {"a": Bytes()})


def a_number_of_bytes_without_an_archive(path):
    written(path, {"a": Bytes()}, _use_new_zipfile_serialization=False)


def a_tensor_by_its_size(path):
    written(path, {"a": Numbers()})


def a_storage_that_is_not_there(path):
    size = (32 * MEGABYTE).to_bytes(4, "little")
    written(path, {"a": torch.zeros(77_777)}, _use_new_zipfile_serialization=False)
    data = path.read_bytes()[: -4 * 77_777]
    path.write_bytes(data.replace(b"J" + (77_777).to_bytes(4, "little"), b"J" + size))


BOMBS = {
    compressed: "bytes that unpack to",
    overlapping: "bytes that unpack to",
    a_number_of_bytes: "names '__builtin__ bytearray'",
    a_number_of_bytes_without_an_archive: "names '__builtin__ bytearray'",
    a_tensor_by_its_size: "names 'torch Tensor'",
    a_storage_that_is_not_there: "asks for 33554432 numbers in a file of",
}


def refused(folder, says):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFileError, match=f"adapter_model.bin: .*{says}.*ask for a safetensors file"):
        read_tensors(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30 * 1024, f"{grown} kB"


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b.__name__)
def test_a_small_file_that_would_take_much_memory_is_refused_without_taking_it(tmp_path, bomb):
    path = tmp_path / "adapter_model.bin"
    bomb(path)
    assert path.stat().st_size < 5 * MEGABYTE
    assert ended(started(refused, tmp_path, BOMBS[bomb])) == 0


SOUND = {
    "plain": {"a": torch.ones(3, 4), "b": torch.arange(5), "c": torch.ones(2, 2, dtype=torch.bfloat16)},
    "views": {"a": torch.arange(12.0).view(3, 4).t(), "b": torch.arange(12.0)[2:7]},
    "parameters": {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.ones((), dtype=torch.bool)},
    "empty": {},
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("case", SOUND)
def test_what_torch_saves_of_tensors_is_read(tmp_path, case, archive):
    written(tmp_path / "adapter_model.bin", SOUND[case], _use_new_zipfile_serialization=archive)
    found = read_tensors(tmp_path)
    assert found.keys() == SOUND[case].keys() and all(torch.equal(found[k], t) for k, t in SOUND[case].items())


def test_a_pickle_of_the_python_library_is_refused(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(AdapterFileError, match="not a file of tensors only"):
        read_tensors(tmp_path)
