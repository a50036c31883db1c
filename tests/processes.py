"""Run scripts in child processes, forked from one that has already imported torch, so that they start quickly."""
import importlib
import multiprocessing
import os
import socket
import sys
import traceback

if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
    FORK = multiprocessing.get_context("forkserver")
    FORK.set_forkserver_preload(["torch._dynamo", "train", "finetune", __name__])
else:
    FORK = multiprocessing.get_context("spawn")


def child_main(script, argv, output, patch, environment):
    """Run script.main as Python would, after patch(); stdout and stderr are appended to the file `output`."""
    import config
    os.environ.update(environment)
    with open(output, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv, code = [script, *argv], 0
    try:
        if patch:
            patch()
        config.run(importlib.import_module(script).main)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else print(left.code, file=sys.stderr) or 1
    except BaseException:
        code = traceback.print_exc() or 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without freeing an error's frames, where torch may hang


def start(script, argv, output, patch=None, **environment):
    """Start a script's main in a child process."""
    child = FORK.Process(target=child_main, args=(script, argv, output, patch, environment))
    child.start()
    return child


def exit_codes(*children):
    """Wait for children to end; return their exit codes."""
    for child in children:
        child.join(180)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(script, argv, folder, patch=None, count=2):
    """Start processes that train together, as torchrun does; rank 1's output goes to folder/output1."""
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    return [start(script, argv, folder / f"output{rank}", patch, RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(count)]
