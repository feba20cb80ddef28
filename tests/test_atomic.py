"""Saves that are killed, read while they go on, or run out of space: there are the old files or the new ones, nothing between."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from harm import CARD, FILES, ended, killed, limit, save, save_for, saved, small_disk, started

from peft_fx import LoraConfig
from peft_fx.atomic import SAVED, write_files
from peft_fx.errors import AdapterFileError
from peft_fx.files import read_config, write_adapter


def killed_at_every_moment(root, before):
    os.fsync = lambda _: None  # takes most of the time, and is for machines that stop
    results, step, more = [], 0, True
    while more:
        step += 1
        folder = root / str(step) / "adapter"
        folder.parent.mkdir()
        old = None
        if before != "nothing":
            save(folder, 1)
            old = 1
        if before == "a killed save":
            os.mkdir(folder / SAVED)  # where one was killed that had come to its files' places
            os.replace(folder / "adapter_config.json", folder / SAVED / "adapter_config.json")
        more = killed(step, folder, 2)
        results.append(saved(folder))
        save(folder, 3)
        assert saved(folder) == 3 and {p.name for p in folder.iterdir()} == FILES
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
        shutil.rmtree(folder.parent)
    assert step > 15 and results[0] == old and results[-1] == 2
    assert results == sorted(results, key=lambda found: found == 2)  # old until one moment, new from then on


@pytest.mark.parametrize("before", ["nothing", "a save", "a killed save"])
def test_a_save_that_is_killed_at_any_moment_leaves_the_old_adapter_or_the_new_one(tmp_path, before):
    assert ended(started(killed_at_every_moment, tmp_path, before)) == 0


def test_who_reads_while_others_save_has_the_files_of_one_save(tmp_path):
    folder = tmp_path / "adapter"
    save(folder, 1)
    writers, found = [started(save_for, 0.7, folder, first) for first in (1, 2)], set()
    while any(writer.is_alive() for writer in writers):
        found.add(saved(folder))
    assert [ended(writer) for writer in writers] == [0, 0]
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


def test_a_link_in_the_place_of_a_killed_save_moves_nothing(tmp_path):
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    save(folder, 1)
    save(outside, 9)
    (folder / SAVED).symlink_to(outside)
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_config(folder)
    save(folder, 2)
    assert saved(folder) == 2 and saved(outside) == 9 and {p.name for p in folder.iterdir()} == FILES


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


def limited(folder):
    limit(2**16)
    full(folder)


def test_a_file_that_may_not_get_so_large_is_an_error_and_leaves_nothing(tmp_path):
    save(tmp_path / "there", 1)
    assert ended(started(limited, tmp_path)) == 0


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    with small_disk(tmp_path):
        save(tmp_path / "there", 1)
        full(tmp_path)


def test_a_mount_point_is_saved_to(tmp_path):
    with small_disk(tmp_path):
        save(tmp_path, 1)
        save(tmp_path, 2)
        assert saved(tmp_path) == 2 and {p.name for p in tmp_path.iterdir()} == FILES
