"""Listening and ending, in this process: signals come to its main thread, callers are other threads."""

import asyncio
import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dspy_fst import ConfigurationError
from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import EngineError
from dspy_fst.run.interrupts import Terminated, signals_raise
from dspy_fst.serve.app import create_app
from dspy_fst.serve.listening import LAST_CALL_S, serve
from dspy_fst.serve.serving_settings import ServeSettings
from tests.serve.makers import AUTH, KEY, PATH, Hold, compiled, echo, question, wait_until


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Visit:
    """What a caller's thread does with a server that this thread runs; a server that is not told to end, is."""

    def __init__(self, act, speak=echo, **settings):
        program, self.engine = compiled(speak)
        self.settings = ServeSettings(**{"api_key": KEY, "port": free_port(), **settings})
        self.app = create_app(program, self.settings)
        self.queue = self.app.state.service.queue
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self._act, self.result, self.error = act, None, None
        self._over = threading.Event()
        # A connection of its own for each request, without the work of new TLS settings.
        self._http = httpx.Client(timeout=60, headers=AUTH, limits=httpx.Limits(max_keepalive_connections=0))

    def run(self):
        caller = threading.Thread(target=self._call, daemon=True)
        with signals_raise():  # the caller's signals, too, come before its end
            caller.start()
            try:
                serve(self.app, self.settings)
            finally:
                self._over.set()
                caller.join(60)
        self._http.close()
        if self.error is not None:
            raise self.error
        return self.result

    def _call(self):
        try:
            wait_until(self.ready, "the server is ready")
            self.result = self._act(self)
        except BaseException as error:
            self.error = error
            if not self._over.is_set():
                self.terminate()

    def ready(self):
        assert not self._over.is_set(), "it ended before it was ready"
        try:
            return self._http.get(f"{self.url}/ready").status_code == 200
        except httpx.ConnectError:
            return False

    def ask(self, text):
        return self._http.post(self.url + PATH, json=question(text))

    def asking(self, text):
        """Ask in a thread; the list gets the reply."""
        replies = []
        thread = threading.Thread(target=lambda: replies.append(self.ask(text)), daemon=True)
        thread.start()
        wait_until(lambda: self.queue.at_work() == 1, "the request is at work")
        return thread, replies

    def terminate(self):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_let_in_is_answered_before_the_end_and_the_engine_is_released():
    outcomes, lock, hold = Counter(), threading.Lock(), Hold()

    def one(visit, number):
        for turn in range(1_000):
            text = f"number {number * 1_000 + turn}"
            try:
                reply = visit.ask(text)
                outcome = reply.status_code
                if outcome == 200 and reply.json()["outputs"]["answer"] != f"echo {text}":
                    outcome = "another's answer"
            except httpx.ConnectError:
                outcome = "refused"
            except httpx.HTTPError as error:
                outcome = f"lost: {error!r}"
            with lock:
                outcomes[outcome] += 1
            if outcome != 200:
                return

    def crowd(visit):
        threads = [threading.Thread(target=one, args=(visit, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: (visit.queue.at_work(), visit.queue.waiting()) == (4, 4), "all have asked")
        visit.terminate()
        wait_until(lambda: visit.queue.draining, "it drains")
        hold.free.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    visit = Visit(crowd, hold, max_in_flight=4, max_queue=60)
    visit.run()
    # Four at work and four in line when the signal came were answered; who asked again was told or found nobody.
    assert set(outcomes) <= {200, 503, "refused"}
    assert outcomes[200] == 8
    assert visit.engine.closed >= 1


def test_whoever_stands_at_the_door_when_it_closes_is_told(monkeypatch):
    told, busy = Counter(), threading.Event()

    def block():
        """The loop is busy from before the last call until after it."""
        busy.set()
        time.sleep(LAST_CALL_S + 1)

    def late(visit):
        queue, emptied = visit.queue, visit.queue.emptied

        async def emptied_and_busy(limit_s):
            asyncio.get_running_loop().call_soon(block)
            return await emptied(limit_s)

        monkeypatch.setattr(queue, "emptied", emptied_and_busy)
        visit.terminate()
        assert busy.wait(30)
        with ThreadPoolExecutor(5) as pool:
            told.update(reply.status_code for reply in pool.map(visit.ask, "vwxyz"))

    Visit(late).run()
    assert told == {503: 5}


def test_a_request_that_does_not_end_is_answered_when_the_drain_is_over_and_keeps_nobody(caplog):
    hold = Hold()

    def stay(visit):
        thread, replies = visit.asking("x")
        visit.terminate()
        thread.join(30)
        return replies

    (reply,) = Visit(stay, hold, drain_s=0.3).run()
    hold.free.set()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
    assert "1 requests were not answered within 0.3 s" in caplog.text


def test_a_second_signal_ends_at_once():
    hold, replies = Hold(), []

    def insist(visit):
        thread, got = visit.asking("x")
        visit.terminate()
        wait_until(lambda: visit._http.get(f"{visit.url}/ready").status_code == 503, "it drains")
        visit.terminate()
        thread.join(30)
        replies.extend(got)

    began = time.monotonic()
    with pytest.raises(Terminated):
        Visit(insist, hold, drain_s=600.0).run()
    hold.free.set()
    assert time.monotonic() - began < 60
    assert [reply.status_code for reply in replies] == [503]


def unstarted(load):
    """An app whose engine serves nothing before it is loaded so."""
    program, engine = compiled()
    engine.version, engine.load = None, load
    program.lm.handle.checkpoint = Checkpoint("base", Path(__file__).parent)
    settings = ServeSettings(port=0)
    return create_app(program, settings), settings, engine


def test_a_server_whose_engine_does_not_start_ends_and_says_why():
    def fail(checkpoint):
        raise EngineError("no such weights")

    app, settings, engine = unstarted(fail)
    with pytest.raises(EngineError, match="could not be started: no such weights"):
        serve(app, settings)
    assert engine.closed >= 1


def test_a_server_that_is_ended_while_its_engine_starts_has_not_failed_and_the_log_does_not_say_so(caplog):
    def told_to_end_meanwhile(checkpoint):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: engine.closed > 0, "the engine is closed")
        raise EngineError("closed while it was started")

    app, settings, engine = unstarted(told_to_end_meanwhile)
    caplog.set_level(logging.INFO, "dspy_fst.serve")
    serve(app, settings)
    assert app.state.service.failure is not None
    assert "the server ended while its engine was being started" in caplog.text
    assert "could not be started" not in caplog.text


def test_the_address_is_told_and_only_a_key_that_was_made_here(capsys):
    Visit(Visit.terminate).run()
    told = capsys.readouterr().err
    assert re.search(r"serving Predict at http://127\.0\.0\.1:\d+/v1/program", told)
    assert KEY not in told
    made = Visit(Visit.terminate, api_key=None)
    made.run()
    assert capsys.readouterr().err.count(f"key: {made.settings.api_key}\n") == 1


def test_an_address_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServeSettings(port=taken.getsockname()[1])
        with pytest.raises(ConfigurationError, match="port="):
            serve(create_app(compiled()[0], settings), settings)
