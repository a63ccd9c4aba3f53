"""Run Python programs as processes of their own that need not import torch and transformers again.

They are forked from a process that has imported these, which is what `multiprocessing` calls a fork server, and get
arguments, environment, folder and output of their own. For tests about what a program does, alone, in ranks or when it
is killed; those about a launcher, a console or a clean environment start Python themselves.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTED = [
    "deepspeed",
    "trl.scripts.utils",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "torch.utils.tensorboard",
    "sklearn.metrics",
    "torch._dynamo",
    "hub_cards.export",
    "trainers.cpt_trainer",
    "trainers.contrastive_trainer",
    "trainers.contrastive_mixture",
    "trainers.mining",
]
# Read when huggingface_hub is imported, so that a forked process has them of its parent.
FIXED = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "PYTHONPATH")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(IMPORTED)


class Forked:
    """A program that runs, with what [`subprocess.Popen`] has of it.

    Args:
        program (`str` or `Path`): a file of Python, or the name of a module, which has no slash.
        arguments: its arguments, of which the text is taken.
        folder (`Path`): where it starts; here by default.
        environment (`dict`): variables that are set for it beside those of this process.
        own_session (`bool`): whether it is the first of a group of processes, which a signal can be sent to.
    """

    def __init__(self, program, *arguments, folder=None, environment=None, own_session=False):
        environment = {**os.environ, **(environment or {})}
        changed = [name for name in FIXED if environment.get(name) != os.environ.get(name)]
        assert not changed, f"{changed} are read when Python or huggingface_hub starts: start Python itself"
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("output", "errors")]
        for output in self._outputs:
            output.touch()
        self.args = [str(program), *map(str, arguments)]
        self._process = _SERVER.Process(
            target=_run, args=(self.args, environment, str(folder or Path.cwd()), self._outputs, own_session)
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Return the exit status, negative after a signal, or None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout, stderr=self._outputs[1].read_bytes())

    def communicate(self, timeout=None):
        """Wait for its end, and return what it wrote to its output and to that for errors (`str`s)."""
        self.wait(timeout)
        return tuple(output.read_text() for output in self._outputs)


def run(program, *arguments, timeout=300, **settings):
    """Run a program, see [`Forked`], to its end, and return a [`subprocess.CompletedProcess`]."""
    process = Forked(program, *arguments, **settings)
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_ranks(environments, program, *arguments, timeout=900):
    """Run a program in each environment (`list[dict]`) at the same time, and fail as soon as one of them fails."""
    processes = [Forked(program, *arguments, environment=environment) for environment in environments]
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        assert time.monotonic() < deadline, f"{program} still runs after {timeout} seconds"
        time.sleep(0.02)
    failed = [process for process in processes if process.poll()]
    for process in processes:
        # One that waits for another rank, which is gone, would wait for long.
        if process.poll() is None:
            process.kill()
    assert not failed, failed[0].communicate()[1][-4000:]


def _run(command, environment, folder, outputs, own_session):
    # Else the collector of garbage would copy what the process has of its parent.
    gc.freeze()
    if own_session:
        os.setsid()
    # As in a process that was not forked.
    multiprocessing.set_start_method(None, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(outputs, start=1):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    try:
        if os.sep in command[0]:
            sys.path.insert(0, os.path.dirname(command[0]))
            runpy.run_path(command[0], run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        # multiprocessing ends a process without them.
        atexit._run_exitfuncs()
