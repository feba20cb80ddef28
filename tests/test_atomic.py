"""Saves that are killed, read while they go on, or run out of space: there are the old files or the new ones, nothing between."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from peft_fx import LoraConfig
from peft_fx.atomic import SAVED, write_files
from peft_fx.errors import AdapterFileError
from peft_fx.files import read_config, write_adapter
from peft_fx.files.read import config_in, of_one_save, tensors_in
from peft_fx.hf.card import CARD

FILES = {CARD, "adapter_config.json", "adapter_model.safetensors"}
SYSTEM = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}  # audited before they happen


def save(folder, number):
    """The n-th save: alpha, tensor and card say n."""
    others = {CARD: lambda path: path.write_text(str(number))}
    write_adapter(folder, LoraConfig(lora_alpha=number), {"a": torch.full((64,), float(number))}, others)


def saved(folder):
    """Which save a folder holds, None if there is none; its files are of one save."""
    try:
        config, tensors = of_one_save(folder, lambda: (config_in(folder), tensors_in(folder)))
    except AdapterFileError:
        assert not folder.exists()
        return None
    assert tensors["a"].tolist() == [config.lora_alpha] * 64, f"alpha {config.lora_alpha}, tensor {tensors['a'][0]}"
    return config.lora_alpha


def in_child(function):
    """Runs it in a process of its own; its exit code, below 0 for a signal."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step, function):
    """Runs it in a process that is killed before its n-th call of the system. Whether there was one."""

    def run():
        calls = iter(range(1, step))

        def audit(event, _):
            if event in SYSTEM and next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        function()

    code = ended(in_child(run))
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("before", ["nothing", "a save", "a killed save"])
def test_a_save_that_is_killed_at_any_moment_leaves_the_old_adapter_or_the_new_one(tmp_path, before):
    results, step, killed = [], 0, True
    while killed:
        step += 1
        folder = tmp_path / str(step) / "adapter"
        folder.parent.mkdir()
        old = None
        if before != "nothing":
            save(folder, 1)
            old = 1
        if before == "a killed save":
            os.mkdir(folder / SAVED)  # where one was killed that had come to its files' places
            os.replace(folder / "adapter_config.json", folder / SAVED / "adapter_config.json")
        killed = kill_at(step, lambda folder=folder: save(folder, 2))
        results.append(saved(folder))
        save(folder, 3)
        assert saved(folder) == 3 and {p.name for p in folder.iterdir()} == FILES
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
        assert peft.LoraConfig.from_pretrained(folder).lora_alpha == 3
        shutil.rmtree(folder.parent)
    assert step > 15 and results[0] == old and results[-1] == 2
    assert results == sorted(results, key=lambda found: found == 2)  # old until one moment, new from then on


def test_who_reads_while_others_save_has_the_files_of_one_save(tmp_path):
    folder = tmp_path / "adapter"
    save(folder, 1)
    until = time.monotonic() + 1

    def writing(start):
        number = start
        while time.monotonic() < until:
            number += 2
            save(folder, number)

    children = [in_child(lambda start=start: writing(start)) for start in (1, 2)]
    found = set()
    while time.monotonic() < until:
        found.add(saved(folder))
    assert [ended(child) for child in children] == [0, 0]
    assert len(found) > 3 and {p.name for p in folder.iterdir()} == FILES


def test_what_somebody_wrote_after_a_killed_save_comes_first(tmp_path):
    """The save's own files have not come to their places; a user, or PEFT, has written there since."""
    save(tmp_path, 1)
    (tmp_path / SAVED).mkdir()
    for name in FILES:
        shutil.copy(tmp_path / name, tmp_path / SAVED)
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**data, "lora_alpha": 7}))
    assert read_config(tmp_path).lora_alpha == 7
    write_files(tmp_path, {"other": lambda path: path.write_text("x")})
    assert read_config(tmp_path).lora_alpha == 7


def test_a_config_that_was_edited_by_hand_is_read(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 5'))
    assert read_config(tmp_path).lora_alpha == 5


def test_links_in_a_folder_are_replaced_and_a_linked_folder_is_written_to(tmp_path):
    real, outside = tmp_path / "real", tmp_path / "outside.json"
    real.mkdir()
    outside.write_text("mine")
    (real / "adapter_config.json").symlink_to(outside)
    (tmp_path / "link").symlink_to(real)
    save(tmp_path / "link", 2)
    assert saved(real) == 2 and outside.read_text() == "mine" and not (real / "adapter_config.json").is_symlink()


PATHS = {"null byte": "a\0b", "surrogate": "a\ud800", "long": "a" * 300, "below a file": "file/adapter"}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_cannot_be_is_one_clear_error(tmp_path, case):
    (tmp_path / "file").write_text("")
    for write in (lambda path: save(path, 1), LoraConfig().save_pretrained):
        with pytest.raises(AdapterFileError, match="cannot be written, nothing has changed"):
            write(Path(tmp_path, PATHS[case]))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_a_files_place_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / CARD).mkdir()
    with pytest.raises(AdapterFileError, match="README.md is a folder there"):
        save(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [CARD]


# Full disks


def full(folder):
    """What happens to a large save where there is no space for it."""
    new = folder / "below" / "new"
    for place in (folder / "there", new):
        try:
            write_adapter(place, LoraConfig(), {"a": torch.zeros(2**20)})
        except AdapterFileError as error:
            assert "cannot be written, nothing has changed" in str(error), error
        else:
            raise AssertionError("it was written")
    assert saved(folder / "there") == 1
    assert {p.name for p in (folder / "there").iterdir()} == FILES and not new.parent.exists()


def test_a_file_that_may_not_get_so_large_is_an_error_and_leaves_nothing(tmp_path):
    save(tmp_path / "there", 1)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        full(tmp_path)

    assert ended(in_child(limited)) == 0


@pytest.fixture
def small_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_is_an_error_and_leaves_nothing(small_disk):
    save(small_disk / "there", 1)
    full(small_disk)


def test_a_mount_point_is_saved_to(small_disk):
    save(small_disk, 1)
    save(small_disk, 2)
    assert saved(small_disk) == 2 and {p.name for p in small_disk.iterdir()} == FILES
    assert load_file(small_disk / "adapter_model.safetensors")["a"][0] == 2
