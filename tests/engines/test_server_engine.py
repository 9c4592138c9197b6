"""The server engine against a server that says what it must answer: nothing lost, doubled or out of order, whatever goes wrong."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import END, VOCABULARY, Behaviour, FakeServer, response

from cropi_tools.engines.protocol import Completion, Request, Sampling, sample_seed
from cropi_tools.engines.server_engine import SEED_BITS, ServerEngine
from cropi_tools.engines.server_probes import scaled
from cropi_tools.policy.tokens import Tokens, load_tokens
from cropi_tools.runtime import signals
from cropi_tools.runtime.errors import CropiError, InputError, Interrupted, UsageError

Start = Callable[..., FakeServer]
Open = Callable[..., ServerEngine]


@pytest.fixture
def tokens(policy_folder: Path) -> Tokens:
    return load_tokens(str(policy_folder))


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server that behaves as told."""
    running: list[FakeServer] = []

    def begin(**behavior: Any) -> FakeServer:
        running.append(FakeServer(Behaviour(**behavior)))
        return running[-1]

    yield begin
    for server in running:
        server.close()


@pytest.fixture
def open_engine(tokens: Tokens) -> Iterator[Open]:
    """Opens an engine on a server, closed at the end."""
    opened: list[ServerEngine] = []

    def begin(server: FakeServer | str, **options: Any) -> ServerEngine:
        url = server if isinstance(server, str) else server.url
        opened.append(ServerEngine(url, options.pop("tokens", tokens), **options))
        return opened[-1]

    yield begin
    for engine in opened:
        engine.close()
    assert "server client" not in {thread.name for thread in threading.enumerate()}


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request([5, 6, 7 + k % 5], sample_seed(3, "p", k)) for k in range(first, first + count)]


def sent(request: Request) -> int:
    return request.seed % 2**SEED_BITS


def expected(wanted: list[Request], sampling: Sampling) -> list[Completion]:
    found = []
    for request in wanted:
        ids, told = response(request.prompt_token_ids, sent(request), sampling.max_tokens, sampling.temperature)
        found.append(Completion(ids, told if sampling.temperature else None, "stop" if ids[-1] == END else "length"))
    return found


def same(found: list[Completion], wanted: list[Completion]) -> None:
    assert [(one.token_ids, one.finish_reason) for one in found] == [(w.token_ids, w.finish_reason) for w in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        assert one.logprobs is None or one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def survives_text(request: Request, sampling: Sampling) -> bool:
    """Whether the tokenizer gives a response's tokens again for its text; it drops spaces and has no text for padding."""
    return not {0, 70} & set(expected([request], sampling)[0].token_ids)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.9, 2.0, 0.0])
def test_tokens_and_logprobs_are_those_of_the_tempered_softmax(
    kind: str, temperature: float, start: Start, open_engine: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is left to its own defaults anywhere picks one token always."""
    server = start(kind=kind)
    wanted, sampling = requests(30), Sampling(9, temperature)
    found = open_engine(server).sample(wanted, sampling)
    same(found, expected(wanted, sampling))
    assert {one.finish_reason for one in found} == {"stop", "length"} or temperature == 0.0
    assert len({tuple(one.token_ids) for one in found}) > (20 if temperature >= 0.9 else 1)
    assert capsys.readouterr().err == ""


def test_the_plain_interface_is_tokenized_anew(
    start: Start, open_engine: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text only: tokens from the text, the end token from the finish reason, no log-probabilities, and one warning."""
    server = start(kind="openai", max_model_len=None)
    engine, sampling = open_engine(server), Sampling(9, 1.0)
    wanted = [request for request in requests(40) if survives_text(request, sampling)]
    found = engine.sample(wanted, sampling)
    same(found, [one._replace(logprobs=None) for one in expected(wanted, sampling)])
    assert {one.finish_reason for one in found} == {"stop", "length"}
    engine.sample(wanted, sampling)
    (line,) = capsys.readouterr().err.splitlines()
    assert "tells no token ids" in line
    assert "--behavior" in line
    standard = {"model", "prompt", "seed", "n", "stream", "top_p", "presence_penalty", "frequency_penalty"}
    assert all(body.keys() == standard | {"max_tokens", "temperature"} for body in server.bodies)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_a_server_that_tells_no_tokens(
    kind: str, start: Start, open_engine: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older vLLM, or llama.cpp where a character was cut: log-probabilities without tokens are of no use."""
    engine, sampling = open_engine(start(kind=kind, token_ids=False)), Sampling(9, 1.0)
    wanted = [request for request in requests(20) if survives_text(request, sampling)]
    same(engine.sample(wanted, sampling), [one._replace(logprobs=None) for one in expected(wanted, sampling)])
    assert "tells no token ids" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_logprobs_of_another_distribution_are_not_taken(
    kind: str, start: Start, open_engine: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(kind=kind, raw=True)
    engine, wanted = open_engine(server), requests(10)
    for temperature in (0.5, 0.97, 1.5):
        sampling = Sampling(6, temperature)
        for _ in range(2):
            same(engine.sample(wanted, sampling), [one._replace(logprobs=None) for one in expected(wanted, sampling)])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"at temperature {temperature:g}" in line
        assert "--behavior" in line
        assert kind != "vllm" or "--logprobs-mode processed_logprobs" in line
    same(engine.sample(wanted, Sampling(6, 1.0)), expected(wanted, Sampling(6, 1.0)))  # raw is right at 1
    assert capsys.readouterr().err == ""


def test_scores_are_no_logprobs(start: Start, open_engine: Open) -> None:
    with pytest.raises(InputError, match="scores in place of log-probabilities; start it with --logprobs-mode"):
        open_engine(start(as_scores=True)).sample(requests(10), Sampling(6, 1.0))


def test_what_two_temperatures_tell() -> None:
    at_one = {"a": -0.2, "b": -2.2, "c": -4.2}
    assert scaled(at_one, {"a": -0.02, "b": -4.02, "c": -8.02}, 0.5) is True
    assert scaled(at_one, {"a": -0.02, "b": -4.05, "d": -5.0, "c": -8.08}, 0.5) is True
    assert scaled(at_one, at_one, 0.5) is False
    assert scaled(at_one, {"a": -0.2, "b": -3.2, "c": -6.2}, 0.5) is False  # as at neither temperature
    assert scaled({"a": -1.1, "b": -1.1}, {"a": -1.1, "b": -1.1}, 0.5) is None  # equal at any temperature
    assert scaled(at_one, {"z": -1.0, "a": -1.0}, 0.5) is None


def test_a_server_that_ignores_seeds_is_told(
    start: Start, open_engine: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    open_engine(start(kind="sglang", honours_seeds=False)).sample(requests(4), Sampling(16, 1.0))
    (line,) = capsys.readouterr().err.splitlines()
    assert "other responses for the same seed" in line
    assert "--enable-deterministic-inference" in line


@pytest.mark.parametrize("failures", [[429], [500, 503], [429, 429, 500, 408, 429]])
def test_failures_that_pass_are_retried(failures: list[Any], start: Start, open_engine: Open) -> None:
    """Each response is in the result once, in its place."""
    server = start(failures=failures)
    wanted, sampling = requests(24), Sampling(7, 1.0)
    groups = [wanted[:5], wanted[5:6], wanted[6:24]]
    found = list(open_engine(server, concurrency=6).stream(groups, sampling))
    assert [len(group) for group in found] == [5, 1, 18]
    same([one for group in found for one in group], expected(wanted, sampling))
    for request in wanted:
        key = (tuple(request.prompt_token_ids), sent(request), 7, 1.0)
        assert server.answered[key] == 1
        assert server.tries[key] == len(failures) + 1


def test_lost_connections_are_retried(start: Start, open_engine: Open) -> None:
    wanted, sampling = requests(6), Sampling(7, 1.0)
    same(open_engine(start(failures=["drop"])).sample(wanted, sampling), expected(wanted, sampling))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "too many requests .429., 8 retries later too; lower --concurrency"),
        (500, "the server fails .*no luck.*8 retries later too; see its log"),
        (400, "refuses a prompt of 3 tokens .*no luck.*lower --max-tokens"),
        (404, "not found .*no luck.*--served-model"),
    ],
)
def test_failures_that_stay_end_in_a_sentence(status: int, message: str, start: Start, open_engine: Open) -> None:
    """Groups before the failure are given first."""
    wanted, sampling = requests(9), Sampling(7, 1.0)
    server = start(always=status, only_seed=sent(wanted[7]))
    answers = open_engine(server).stream([wanted[:4], wanted[4:6], wanted[6:]], sampling)
    same(next(answers), expected(wanted[:4], sampling))
    same(next(answers), expected(wanted[4:6], sampling))
    with pytest.raises(InputError, match=message) as error:
        next(answers)
    assert str(error.value).startswith(server.url)
    assert "\n" not in str(error.value)


def test_a_slow_server_is_given_up(start: Start, open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi_tools.engines.server_client.RETRIES", 1)
    server = start(seconds=1.0)
    with pytest.raises(InputError, match=r"no answer within 0.2 s; lower --concurrency"):
        open_engine(server, timeout=0.2).sample(requests(1), Sampling(7, 0.0))
    assert len(server.bodies) == 2


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_no_more_than_the_bound_at_once(start: Start, open_engine: Open) -> None:
    wanted, sampling = requests(60), Sampling(4, 0.0)
    gate = threading.Event()
    server = start(hold={sent(request): gate for request in wanted}, seconds=0.002)
    groups = [wanted[i : i + 7] for i in range(0, 60, 7)]
    found: list[list[Completion]] = []
    engine = open_engine(server, concurrency=5)
    thread = threading.Thread(target=lambda: found.extend(engine.stream(groups, sampling)))
    thread.start()
    wait_until(lambda: server.now == 5)  # reached
    gate.set()
    thread.join(60)
    same([one for group in found for one in group], expected(wanted, sampling))
    assert server.most == 5  # and never passed


def test_a_slow_head_holds_up_a_bounded_number(start: Start, open_engine: Open) -> None:
    """Later groups are begun while the first waits for one response, but not all of them; the order stays."""
    wanted, sampling = requests(400), Sampling(3, 0.0)
    gate = threading.Event()
    server = start(hold={sent(wanted[2]): gate})
    taken: list[int] = []

    def groups() -> Iterator[list[Request]]:
        for place in range(0, 400, 4):
            taken.append(place)
            yield wanted[place : place + 4]

    found: list[list[Completion]] = []
    engine = open_engine(server, concurrency=8)
    thread = threading.Thread(target=lambda: found.extend(engine.stream(groups(), sampling)))
    thread.start()
    wait_until(lambda: len(server.answered) >= 63)
    time.sleep(0.2)
    assert len(taken) == 16  # 8 times the concurrency, 4 a group
    assert found == []
    gate.set()
    thread.join(20)
    same([one for group in found for one in group], expected(wanted, sampling))
    assert all(count == 1 for count in server.answered.values())


def test_groups_are_taken_as_needed(start: Start, open_engine: Open) -> None:
    wanted, taken = requests(100), []

    def groups() -> Iterator[list[Request]]:
        for place in range(0, 100, 5):
            taken.append(place)
            yield wanted[place : place + 5]

    answers = open_engine(start(), concurrency=4).stream(groups(), Sampling(3, 0.0))
    next(answers)
    assert len(taken) <= 8
    answers.close()


def test_empty_groups_and_no_groups(start: Start, open_engine: Open) -> None:
    engine, sampling = open_engine(start()), Sampling(3, 1.0)
    assert list(engine.stream([], sampling)) == []
    found = list(engine.stream([[], requests(2), []], sampling))
    assert [len(group) for group in found] == [0, 2, 0]


def test_the_wish_to_stop_is_noticed_while_waiting(
    start: Start, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, sampling = requests(6), Sampling(3, 0.0)
    server = start(hold={sent(wanted[4]): threading.Event()})
    answers = open_engine(server).stream([wanted[:3], wanted[3:]], sampling)
    same(next(answers), expected(wanted[:3], sampling))
    timer = threading.Timer(0.3, lambda: monkeypatch.setattr(signals, "_stop_signal", 15))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        next(answers)
    assert time.monotonic() - begun < 2.0
    timer.join()


def test_closing_cancels_what_was_begun(start: Start, open_engine: Open) -> None:
    wanted, sampling = requests(40), Sampling(3, 0.0)
    gate = threading.Event()
    server = start(hold={sent(request): gate for request in wanted[1:40]})
    engine = open_engine(server, concurrency=4)
    answers = engine.stream([wanted[:1], *([request] for request in wanted[1:])], sampling)
    next(answers)
    wait_until(lambda: server.now == 4)
    answers.close()
    gate.set()
    wait_until(lambda: server.now == 0)
    time.sleep(0.1)
    assert len(server.bodies) <= 5  # what waited for a place never set out
    same(engine.sample(wanted[:3], sampling), expected(wanted[:3], sampling))  # the engine lives on


def test_closing_the_engine_while_it_is_busy(start: Start, open_engine: Open) -> None:
    wanted = requests(10)
    server = start(hold={sent(request): threading.Event() for request in wanted[1:]})
    engine = open_engine(server, concurrency=4)
    answers = engine.stream([wanted[:1], wanted[1:]], Sampling(3, 0.0))
    next(answers)
    engine.close()
    engine.close()
    answers.close()


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    start: Start, open_engine: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(key="sk-secret-7")
    with pytest.raises(InputError, match=r"refuses requests without a key .401.; set OPENAI_API_KEY$"):
        open_engine(server)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(InputError, match=r"refuses the key .401.; set OPENAI_API_KEY to one") as refused:
        open_engine(server)
    assert "sk-wrong" not in str(refused.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-7")
    engine, wanted = open_engine(server), requests(3)
    same(engine.sample(wanted, Sampling(3, 1.0)), expected(wanted, Sampling(3, 1.0)))
    server.behavior.always, server.behavior.message = 400, "bad request from sk-secret-7"
    with pytest.raises(InputError, match=r"bad request from \*\*\*") as told:
        engine.sample(wanted, Sampling(3, 1.0))
    everything = str(told.value) + json.dumps(engine.settings(Sampling(3, 1.0))) + "".join(capsys.readouterr())
    assert "secret" not in everything


def test_which_model(start: Start, open_engine: Open) -> None:
    several = start(models=["P0", "P1"])
    with pytest.raises(InputError, match=r"several models or none .P0, P1.; name one with --served-model"):
        open_engine(several)
    assert open_engine(several, served_model="P1").settings(Sampling(3, 1.0))["served_model"] == "P1"
    with pytest.raises(InputError, match="has no model P7; name one of these with --served-model: P0, P1"):
        open_engine(several, served_model="P7")
    with pytest.raises(InputError, match=r"several models or none .none."):
        open_engine(start(models=[]))


def test_where_nobody_answers(start: Start, open_engine: Open) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=f"{url}: no connection .*start the server or correct the address"):
            open_engine(url)
    with pytest.raises(InputError, match=r"elsewhere/v1: no OpenAI-compatible server"):
        open_engine(start().url.removesuffix("/v1") + "/elsewhere")
    server = start()
    engine = open_engine(server)
    server.behavior.junk = True
    with pytest.raises(InputError, match="the answer is not that of an OpenAI-compatible server"):
        engine.sample(requests(1), Sampling(3, 1.0))


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host/v1",
        "http://",
        "http://host:port/v1",
        "http://user:sk-7@host/v1",
        "http://h/v1?key=sk-7",
    ],
)
def test_addresses_that_are_none(url: str, tokens: Tokens) -> None:
    with pytest.raises(UsageError) as error:
        ServerEngine(url, tokens)
    assert "sk-7" not in str(error.value)


def test_addresses_with_and_without_v1(start: Start, open_engine: Open) -> None:
    server = start()
    for url in (server.url, server.url + "/", server.url.removesuffix("/v1"), server.url.removesuffix("v1")):
        assert open_engine(url).settings(Sampling(3, 1.0))["url"] == server.url


def test_the_package_may_be_missing(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'cropi-tools\[server\]'"):
        ServerEngine("http://127.0.0.1:8000", tokens)


def test_a_prompt_longer_than_the_server_takes(start: Start, open_engine: Open) -> None:
    server = start(max_model_len=10)
    engine = open_engine(server)
    assert len(engine.sample(requests(1), Sampling(7, 0.0))) == 1
    with pytest.raises(InputError, match="a prompt of 3 tokens and --max-tokens 8 are more than the server's 10"):
        engine.sample(requests(1), Sampling(8, 0.0))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": "abort"}, "gave up a response .abort."),
        ({"finish_reason": "length", "token_ids": [5, 6]}, "cut a response at 2 tokens, before --max-tokens 4"),
        ({"token_ids": [5, 5, 5, VOCABULARY]}, f"token {VOCABULARY} is none of the {VOCABULARY} of "),
        ({"token_ids": [5, 5, 5, -1]}, "is none of the"),
        (
            {"finish_reason": "stop", "token_ids": [5, 6], "logprobs": None, "stop_reason": 6},
            "ends responses at token 6, which is no end token",
        ),
        (
            {"logprobs": {"token_logprobs": [-0.5]}, "token_ids": [5, 6, 7, 8]},
            "not that of an OpenAI-compatible server",
        ),
        ({"logprobs": {"token_logprobs": [float("nan")] * 4}, "token_ids": [5] * 4}, "scores are not finite"),
    ],
)
def test_answers_that_are_no_samples_of_the_policy(
    change: dict[str, Any], message: str, start: Start, open_engine: Open
) -> None:
    server = start()
    engine = open_engine(server)
    engine.sample(requests(1), Sampling(4, 1.0))
    server.behavior.change = {"finish_reason": "length", **change}
    with pytest.raises(InputError, match=message):
        engine.sample(requests(1), Sampling(4, 1.0))


def test_end_tokens_that_the_server_leaves_out_are_put_back(
    start: Start, open_engine: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them a policy would never learn to end; their log-probability is not known."""
    wanted, sampling = requests(30), Sampling(9, 1.0)
    found = open_engine(start(leaves_out_ends=True)).sample(wanted, sampling)
    same(
        found,
        [one._replace(logprobs=None) if one.finish_reason == "stop" else one for one in expected(wanted, sampling)],
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "leaves out end tokens" in line


def test_a_response_ends_at_its_first_end_token(start: Start, open_engine: Open, tokens: Tokens) -> None:
    """A server that does not know all of the policy's end tokens goes on after them; so does our reading not."""
    wanted, sampling = requests(40), Sampling(9, 1.0)
    ends = (END, 40, 50, 60)
    found = open_engine(start(), tokens=tokens._replace(end_token_ids=list(ends))).sample(wanted, sampling)
    assert len({one.token_ids[-1] for one in found if one.finish_reason == "stop"}) > 1
    for request, one in zip(wanted, found, strict=True):
        ids, told = response(request.prompt_token_ids, sent(request), 9, 1.0, ends)
        assert (one.token_ids, one.finish_reason) == (ids, "stop" if ids[-1] in ends else "length")
        assert one.logprobs == pytest.approx(told, abs=1e-6)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_another_tokenizer_is_refused(
    kind: str, start: Start, open_engine: Open, tokens: Tokens, policy_folder: Path, tmp_path: Path
) -> None:
    open_engine(start(kind=kind, tokenizer=tokens.tokenizer))
    other = tmp_path / "other"
    shutil.copytree(policy_folder, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"P0 has another tokenizer than .*; serve that folder"):
        open_engine(start(kind=kind, tokenizer=load_tokens(str(other)).tokenizer))


@pytest.mark.parametrize(
    ("kind", "version"), [("vllm", "9.9"), ("sglang", "9.9"), ("llamacpp", "b99"), ("openai", None)]
)
def test_settings_say_what_was_sent(kind: str, version: str | None, start: Start, open_engine: Open) -> None:
    server, sampling = start(kind=kind, token_ids=kind != "openai"), Sampling(4, 0.7)
    engine = open_engine(server)
    said = engine.settings(sampling)
    assert (said["engine"], said["server"], said["version"], said["url"]) == ("server", kind, version, server.url)
    wanted = requests(2)
    engine.sample(wanted, sampling)
    bodies = [body for body in server.bodies if body["seed"] in {sent(request) for request in wanted}]
    assert len(bodies) == 2
    for body in bodies:
        assert {key: value for key, value in body.items() if key not in ("model", "prompt", "seed")} == {
            key: said[key] for key in body if key not in ("model", "prompt", "seed")
        }
    assert json.loads(json.dumps(said)) == said


def test_a_temperature_that_the_server_would_raise(start: Start, open_engine: Open) -> None:
    with pytest.raises(UsageError, match=r"takes temperatures from 0.01 on, and 0; raise --temperature"):
        open_engine(start()).sample(requests(1), Sampling(4, 0.001))


def test_a_servers_weights_stay(start: Start, open_engine: Open) -> None:
    with pytest.raises(CropiError, match="weights stay as they are"):
        open_engine(start()).update_weights(None)  # type: ignore[arg-type]
