"""A server in a process of its own: ``python -m tests.serve.child KIND SETTINGS [FOLDER ENGINE]``.

KIND is ``saved`` (a saved program of the laboratory, from FOLDER), or of a scripted program ``slow`` or ``stuck``.
"""

import json
import sys
import time

import dspy_fst
from dspy_fst.serve.app import create_app
from dspy_fst.serve.run import serve
from dspy_fst.serve.settings import ServeSettings
from programs.lab import build
from tests.serve.makers import compiled, echo

SECONDS = {"slow": 0.4, "stuck": 3600.0}


def main(kind, settings, folder=None, engine=None):
    settings = ServeSettings(**json.loads(settings))
    if kind == "saved":
        program = dspy_fst.load(folder, build(train=4, val=0, test=0).program, engine=engine)
    else:
        program, scripted = compiled(lambda m, seed: time.sleep(SECONDS[kind]) or echo(m, seed))
    serve(create_app(program, settings), settings)
    if kind != "saved":
        print(f"closed {scripted.closed}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
