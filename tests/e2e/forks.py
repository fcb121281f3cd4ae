"""Trains once for every list of arguments in a JSON file, each in a fork of this process. It has
imported everything by then, which is most of the time of a run that ends at once.

    python -m tests.e2e.forks FILE

What run i prints goes to FILE.i; the exit codes are printed as JSON.
"""

import json
import os
import sys
import warnings

from webssl_jax import cli, train

# jax warns that its threads do not survive a fork. It has none before it looks for devices.
warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)


def main(file):
    codes = []
    for i, arguments in enumerate(json.load(open(file))):
        child = os.fork()
        if not child:
            printed = os.open(f"{file}.{i}", os.O_CREAT | os.O_WRONLY)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            sys.argv = ["webssl_jax.train", *arguments]
            try:
                cli.run(train.main)
            except SystemExit as stop:
                sys.stderr.flush()
                os._exit(stop.code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1])
