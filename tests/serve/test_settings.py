"""Settings that cannot work are refused together, before anything listens."""

import re
from pathlib import Path

import pytest

from dspy_fst import ConfigurationError
from dspy_fst.engine.machine import is_loopback
from dspy_fst.serve.body import MOST_DEEP, SHOWN_FAULTS
from dspy_fst.serve.chat_request import MOST_MESSAGES
from dspy_fst.serve.serving_settings import ServeSettings


def faults_of(**settings):
    with pytest.raises(ConfigurationError) as refused:
        ServeSettings(**settings)
    return refused.value.faults


def test_a_random_key_is_made_when_none_is_given():
    first, second = ServeSettings(), ServeSettings()
    assert first.made_key
    assert first.api_key != second.api_key
    assert len(first.api_key) >= 32
    assert not ServeSettings(api_key="a-key-of-my-own-0").made_key


def test_the_key_is_not_shown_with_the_settings():
    settings = ServeSettings()
    assert settings.api_key not in repr(settings)


def test_an_address_that_others_reach_needs_a_key():
    assert ServeSettings(host="0.0.0.0").api_key
    assert ServeSettings(no_key=True).api_key is None
    (fault,) = faults_of(host="0.0.0.0", no_key=True)
    assert "a key is needed" in fault


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_addresses_are_known(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""])
def test_other_addresses_are_not_taken_for_loopback(host):
    assert not is_loopback(host)


def test_everything_wrong_is_told_together():
    faults = faults_of(
        port=70_000,
        max_in_flight=0,
        max_queue=-1,
        timeout_s=0,
        choice="worst",
        vote_on="answer",
        path="v1",
        api_key="x",
    )
    named = ("port", "max_in_flight", "max_queue", "timeout_s", "choice", "vote_on", "path", "api_key")
    assert all(any(name in fault for fault in faults) for name in named), faults


@pytest.mark.parametrize("path", ["/metrics", "/v1/chat/completions", "/", "/a b", "/{name}", "/v1//x", "/v1/x/"])
def test_a_path_that_would_hide_another_or_match_many_is_refused(path):
    assert "path" in faults_of(path=path)[0]


def test_the_page_on_serving_has_every_limit_as_it_is():
    page = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()
    rows = dict(re.findall(r"^\| `?([a-z_ ]+)`?[^|]*\| ([\d,]+) \|", page.partition("## Limits")[2], re.MULTILINE))
    told = {name.strip(): float(value.replace(",", "")) for name, value in rows.items()}
    names = ("max_body_bytes", "max_body_values", "max_in_flight", "max_queue", "timeout_s", "drain_s")
    assert {name: told[name] for name in names} == {name: getattr(ServeSettings(), name) for name in names}
    assert told["levels of nesting"] == MOST_DEEP
    assert told["messages of one chat"] == MOST_MESSAGES
    assert told["faults that an error lists"] == SHOWN_FAULTS
