"""Run by a test in a process that knows nothing of this project: snippets, each in a process of its own.

python check_snippets.py FILE ...

Each is forked once what all of them take longest with, which is to import these libraries, is done. Its output is in
FILE.out, that for errors in FILE.err, and its exit status is one of those printed in the end.
"""

import gc
import json
import os
import runpy
import sys

import sentence_transformers  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401


def main(files):
    statuses = []
    # Nor need a child copy it, which the collector of garbage would do.
    gc.collect()
    gc.freeze()
    for file in files:
        child = os.fork()
        if child == 0:
            for number, name in ((1, f"{file}.out"), (2, f"{file}.err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
            runpy.run_path(file, run_name="__main__")
            sys.stdout.flush()
            # To take down all that is imported would take longer than most snippets.
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))


if __name__ == "__main__":
    # Not the folder of this file: folders beside it are named as this project's packages.
    sys.path[0] = ""
    main(sys.argv[1:])
