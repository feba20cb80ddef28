"""What befalls a process that saves: it is killed, or its disk is full. Processes come from a server without threads."""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from peft_fx.errors import AdapterFileError
from peft_fx.files import write_adapter
from peft_fx.files.read import config_in, of_one_save, tensors_in
from peft_fx.methods.lora import LoraConfig

CARD = "README.md"
FILES = {CARD, "adapter_config.json", "adapter_model.safetensors"}
SYSTEM = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}  # audited before they happen

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["pytest", "peft_fx.files", "peft_fx.methods.lora"])


def started(function, *arguments):
    """A process that runs a function of a module; its exit code is 1 after an error, and below 0 for a signal."""
    process = server.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def ended(process):
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


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


def save_for(seconds, folder, number):
    """Every other number from this one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        save(folder, number)
        number += 2


def killed(step, folder, number):
    """Saves in a process that is killed before its n-th call of the system. Whether it was: there may be fewer."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1, step))

        def audit(event, _):
            if event in SYSTEM and next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        save(folder, number)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def limit(size):
    """From now on no file of this process gets larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def small_disk(folder, kilobytes=256):
    """A file system of that size at `folder`. Skips the test where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
