"""Secrets are hidden wherever they stand, and nothing else is."""

import time

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_fst import PolicyLM
from dspy_fst.run.secrets import Redactor

KEY = "topsecret-value-1"
SHAPES = [
    "sk-proj-Ab3dEfGh1jKlMnOp2rStUvWxYz0123456789",
    "sk-ant-api03-Zx9Yw8Vu7Ts6Rq5Po4Nm3Lk2Ji1Hg0Fe-AA",
    "sk-or-v1-0123456789abcdef0123456789abcdef",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "AIza" + "Sy0123456789abcdefghijklmnopqrstuvw"[:35],
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "Bearer 0123456789abcdefABCDEF",
    "bearer  Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZg==",
]
WORDS = [
    "sk",
    "hf",
    "Bearer",
    "token",
    "api",
    "key",
    "gsk",
    "AIza",
    "eyJ",
    "ghp",
    "http",
    "step",
    "000012",
    "42",
    "Größe",
]
JOINTS = [" ", "-", "_", ". ", ": ", "\n", ", ", "://", "/", "="]


def cleaned(text, *secrets):
    return Redactor(secrets).clean(text)


@pytest.mark.parametrize("key", SHAPES)
def test_a_key_is_known_by_its_shape(key):
    for text in (f"error: {key}", f"({key})", f'{{"k": "{key}"}}', f"{key}\nmore"):
        assert key.split()[-1] not in cleaned(text)
        assert "***" in cleaned(text)


def test_the_password_of_an_address_is_hidden_and_the_address_is_not():
    assert cleaned("see http://me:hunter2@host:8000/v1") == "see http://***@host:8000/v1"


ORDINARY = [
    "Ask for the task-oriented answer; risk-averse and desk-top words stay.",
    "Authorization: use a Bearer token, e.g. Bearer <your token here>.",
    "sk-learn's sk-learn-compatible-estimators-of-2024 are fine",
    "Bearer internationalization-and-localization-2024 notes",
    "sk-internationalization-guide-for-beginners-2024",
    "hf_hub_download and hf_transfer",
    "Steps 000012-000024: 0.123456789012345678",
    "http://host:8000/v1 and mailto:me@host",
    "The password is asked for, the api_key as well.",
    "eyJust a word. eyJ.eyJ.",
    "branch risk-0123456789abcdef0123456789",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_text_is_left_as_it_is(text):
    assert cleaned(text, "password", "changeme", "16000000") == text


@pytest.mark.slow
@given(st.text())
def test_no_text_without_a_secret_is_changed(text):
    assert cleaned(text, KEY) == text


words = st.sampled_from(WORDS) | st.from_regex(r"[A-Za-z]{1,25}|[0-9]{1,15}|[A-Za-z0-9]{1,15}", fullmatch=True)


@given(st.lists(st.tuples(words, st.sampled_from(JOINTS))))
def test_words_joined_in_any_way_are_no_secret(parts):
    text = "".join(word + joint for word, joint in parts)
    assert cleaned(text, KEY) == text


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_plain_values_keep_their_form(value):
    assert cleaned(value, KEY) == value


@given(st.text(), st.text())
def test_a_known_secret_never_gets_through(before, after):
    assert KEY not in cleaned(before + KEY + after, KEY)


def test_secrets_are_found_at_any_depth_and_in_keys():
    value = {"event": "note", "rows": [{f"of {KEY}": (KEY, 1, None, 0.5)}]}
    assert cleaned(value, KEY) == {"event": "note", "rows": [{"of ***": ["***", 1, None, 0.5]}]}


def test_it_says_where_secrets_stand():
    value = {"first": {"demos": [{"answer": "fine"}, {"answer": KEY}], "lm": None}, "n": 1}
    assert Redactor([KEY]).places(value) == ["first.demos[1].answer"]
    assert Redactor().places(value) == []


def test_of_two_secrets_that_begin_alike_the_longer_is_hidden_whole():
    assert cleaned("abc-1234-5678", "abc-1234", "abc-1234-5678") == "***"


def test_short_values_ordinary_words_numbers_and_files_are_no_secrets(tmp_path):
    path = tmp_path / "key-1.json"
    path.write_text("")
    for value in ("EMPTY", "a1b2c3", "notneeded", "Password", "16000000", str(path)):
        assert cleaned(f"{value} here", value) == f"{value} here"


LM_SETTINGS = [
    {"api_key": KEY},
    {"extra_headers": {"Authorization": f"Bearer {KEY}"}},
    {"headers": {"x-api-key": KEY}},
    {"aws_secret_access_key": KEY},
    {"azure_ad_token": KEY},
    {"fallback_keys": ["short", KEY]},
    {"vertex_credentials": {"type": "service_account", "private_key": KEY}},
    {"launch_kwargs": {"api_key": KEY}},
]


@pytest.mark.parametrize("settings", LM_SETTINGS)
@pytest.mark.parametrize("holder", ["predictor", "module", "reflection", "configured"])
def test_the_secrets_of_every_lm_are_known(settings, holder):
    program, lm = dspy.ChainOfThought("question -> answer"), dspy.LM("openai/gpt-5", **settings)
    if holder == "predictor":
        program.set_lm(lm)
    elif holder == "module":
        program.judge = lm
    with dspy.context(lm=lm if holder == "configured" else None):
        redactor = Redactor.of(program, lm if holder == "reflection" else None)
    assert redactor.clean(f"401: bad credential {KEY}") == "401: bad credential ***"


def test_the_engine_s_key_is_known():
    program = dspy.Predict("question -> answer")
    options = {"attach_url": "http://127.0.0.1:8000", "api_key": KEY}
    program.set_lm(PolicyLM("no-model", engine="vllm", engine_options=options))
    assert Redactor.of(program).clean(KEY) == "***"


class EngineWithKey:
    """Somebody's engine that holds its own connection."""

    def __init__(self):
        self.api_key = KEY

    def complete(self, request):
        raise NotImplementedError


def test_a_custom_engine_s_key_is_known():
    program = dspy.Predict("question -> answer")
    program.set_lm(dspy.LM("mine", engine=EngineWithKey()))
    assert Redactor.of(program).clean(KEY) == "***"


def test_a_predictor_s_own_call_settings_are_looked_at():
    assert Redactor.of(dspy.Predict("question -> answer", api_key=KEY)).clean(KEY) == "***"


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "HF_TOKEN", "DB_PASS", "client_secret", "SMTP_PASSWORD", "MYAPIKEY"]
)
def test_environment_variables_whose_name_says_so_are_secret(monkeypatch, name):
    monkeypatch.setenv(name, KEY)
    assert Redactor.of(dspy.Predict("a -> b")).clean(f"got {KEY}") == "got ***"


@pytest.mark.parametrize("name", ["TOKENIZER", "KEYBOARD", "MODEL", "COMPASS", "TOKENIZERS_CONFIG"])
def test_other_environment_variables_are_not(monkeypatch, name):
    monkeypatch.setenv(name, "Qwen/Qwen3-0.6B")
    assert Redactor.of(dspy.Predict("a -> b")).clean("model Qwen/Qwen3-0.6B") == "model Qwen/Qwen3-0.6B"


def test_an_lm_s_past_calls_are_not_taken_for_settings():
    lm = dspy.LM("openai/gpt-5")
    lm.history.append({"kwargs": {}, "messages": [{"token": "an ordinary-answer 1"}]})
    assert Redactor.of(dspy.Predict("a -> b"), lm).clean("an ordinary-answer 1") == "an ordinary-answer 1"


@pytest.mark.parametrize(
    "text",
    [
        "sk-" + "a" * 200_000,
        "sk-a " * 50_000,
        "eyJ" + "-eyJ" * 50_000,
        "://a" * 50_000,
        "bearer " * 30_000,
        "Bearer " + "a-" * 100_000,
        "sk-" + "a1-" * 70_000,
    ],
)
def test_no_text_takes_long(text):
    started = time.perf_counter()
    Redactor([KEY]).clean(text)
    assert time.perf_counter() - started < 10  # seconds; what backtracks takes minutes
