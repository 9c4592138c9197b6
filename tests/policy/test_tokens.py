"""At which tokens responses end, which ids are refused, and how long a sequence may be: by folders as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_policy
import transformers

from cropi_tools.policy.loading import load_policy
from cropi_tools.policy.positions import positions
from cropi_tools.policy.prompts import PromptCheck, encoded_prompt
from cropi_tools.policy.tokens import Tokens, load_tokens
from cropi_tools.runtime.errors import InputError

ROWS = len(tiny_policy.CHARACTERS) + 2
END, Z, Y, X = 1, *(tiny_policy.CHARACTERS.index(c) + 2 for c in "ZYX")


def chat(end: str) -> str:
    """A template in which `end` stands after every message."""
    messages = "{% for m in messages %}{{ m.role }} {{ m.content }}" + end + "{% endfor %}"
    return messages + "{% if add_generation_prompt %}assistant {% endif %}"


# harmony's: a message that is not the last ends otherwise than the last, at which the turn does
HARMONY = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}Z{% else %}Y{% endif %}{% endfor %}"
)


def folder(
    path: Path,
    eos: Any = "absent",
    template: str | None = None,
    own: str | None = tiny_policy.END,
    special: str = "",
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    extra: tuple[str, ...] = (),
) -> str:
    """A tiny policy's folder.

    eos: of generation_config.json. own: the tokenizer's end token. special: characters that are special tokens. config, settings: more of
    config.json and generation_config.json. extra: tokens that the tokenizer has beyond the model's.
    """
    tiny_policy.save(path)
    tokenizer = tiny_policy.tokenizer()
    tokenizer.eos_token = own
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(extra))
    tokenizer.save_pretrained(path)
    changes = {
        "config.json": config or {},
        "generation_config.json": {**(settings or {}), **({} if eos == "absent" else {"eos_token_id": eos})},
    }
    for name, change in changes.items():
        found = json.loads((path / name).read_text())
        if name == "generation_config.json" and eos == "absent":
            del found["eos_token_id"]
        (path / name).write_text(json.dumps({**found, **change}))
    return str(path)


# what the folder says, the tokens that end a response, the usual one, and how many are told of
ENDS: dict[str, tuple[dict[str, Any], list[int], int, int]] = {
    "one end everywhere": ({"eos": 1}, [END], END, 0),
    "the tokenizer alone": ({}, [END], END, 0),
    "the settings alone": ({"eos": [1, Z], "own": None}, [END, Z], END, 0),
    "Qwen chat: both in the settings": (
        {"eos": [Z, 1], "own": "Z", "template": chat("Z"), "special": "Z"},
        [Z, END],
        Z,
        0,
    ),
    "chat tokenizer over a base model's settings": (
        {"eos": 1, "own": "Z", "template": chat("Z"), "special": "Z"},
        [END, Z],
        Z,
        1,
    ),
    "base model with a chat template": ({"eos": 1, "template": chat("Z"), "special": "Z"}, [END, Z], Z, 1),
    "Llama 3: the turn's end in neither": (
        {"eos": [1, X], "template": chat("Z"), "special": "XZ"},
        [END, X, Z],
        Z,
        1,
    ),
    "three of them": ({"eos": X, "own": "Y", "template": chat("Z"), "special": "XYZ"}, [X, Y, Z], Z, 2),
    "white space before the turn's end": ({"eos": 1, "template": chat(" Z"), "special": "Z"}, [END, Z], Z, 1),
    "gpt-oss: messages end otherwise than turns": (
        {"eos": [Z, 1, X], "own": "Z", "template": HARMONY, "special": "XYZ"},
        [Z, END, X],
        Z,
        0,
    ),
    "a turn that ends with plain text": ({"eos": 1, "template": chat("Z")}, [END], END, 0),
    "a turn that ends with nothing": ({"eos": 1, "template": chat("")}, [END], END, 0),
    "a template that refuses": ({"eos": 1, "template": "{{ raise_exception('no') }}"}, [END], END, 0),
    "a template that fails": ({"eos": 1, "template": "{{ 1 + messages }}"}, [END], END, 0),
    "an end named twice": ({"eos": [1, 1]}, [END], END, 0),
}


@pytest.mark.parametrize("name", ENDS)
def test_responses_end_at_every_end_token(name: str, tmp_path: Path) -> None:
    given, ends, usual, told = ENDS[name]
    path = folder(tmp_path / "P0", **given)
    found = load_tokens(path)
    assert (found.end_token_ids, found.usual_end, len(found.unlisted)) == (ends, usual, told)
    policy = load_policy(path, "cpu")
    assert policy.end_token_ids == ends
    assert policy.tokens._replace(tokenizer=None) == found._replace(tokenizer=None)


def test_other_end_tokens_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = load_tokens(folder(tmp_path / "P0", eos=1, own="Y", template=chat("Z"), special="YZ"))
    for _ in range(2):
        tokens.tell_ends()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "responses" in line]
    assert f"Y ({Y}, the tokenizer's end token) and at Z ({Z}, the chat template's end of a turn)" in said


def test_a_sampled_response_stops_at_them(policy_folder: Path, tmp_path: Path) -> None:
    """With half of the vocabulary as end tokens of the tokenizer's and the template's, none stands before the last place."""
    from cropi_tools.engines.protocol import Request, Sampling
    from cropi_tools.engines.transformers_engine import TransformersEngine

    path = folder(tmp_path / "P0", eos=1, own="Z", template=chat("Y"), special="YZ")
    policy = load_policy(path, "cpu")
    found = TransformersEngine(policy).sample([Request([3, 4], seed) for seed in range(200)], Sampling(12, 5.0))
    ended = [one.token_ids[-1] for one in found if one.finish_reason == "stop"]
    assert set(ended) == {END, Z, Y}
    assert not any(token in (END, Z, Y) for one in found for token in one.token_ids[:-1])


BROKEN_IDS = ["1", "</s>", "", [], ["1"], [1, "2"], [[1]], {"a": 1}, True, [True], -1, [1, -2], 1.0, ROWS, [1, 999]]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", BROKEN_IDS, ids=str)
def test_what_is_no_end_token_is_refused(value: Any, where: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "P0", eos=value, config={"eos_token_id": value} if where == "config.json" else None)
    if where == "config.json":
        (tmp_path / "P0" / "generation_config.json").unlink()
    for load in (load_tokens, load_policy):
        with pytest.raises(InputError) as refused:
            load(path)
        said = str(refused.value)
        assert "\n" not in said
        assert where in said or "configuration does not open" in said, said
        assert "eos_token_id" in said, said


@pytest.mark.parametrize("value", ["0", -2, True, 0.5, [0], ROWS, 32000], ids=str)
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_what_is_no_padding_token_is_refused(where: str, value: Any, tmp_path: Path) -> None:
    change = {"pad_token_id": value}
    given = {"config": change} if where == "config.json" else {"settings": change}
    path = folder(tmp_path / "P0", eos=1, **given)
    for load in (load_tokens, load_policy):
        with pytest.raises(InputError, match="pad_token_id") as refused:
            load(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [-1, None], ids=str)
def test_no_padding_token_is_none(value: int | None, tmp_path: Path) -> None:
    load_policy(folder(tmp_path / "P0", eos=1, config={"pad_token_id": value}), "cpu")


def test_special_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    for name in ("eos_token", "pad_token"):
        path = tmp_path / name
        folder(path, eos=1)
        tokenizer = tiny_policy.tokenizer()
        tokenizer.add_special_tokens({name: "<extra>"})
        tokenizer.save_pretrained(path)
        with pytest.raises(InputError, match=f"tokenizer_config.json: {name} <extra> is token {ROWS}, .* only {ROWS}"):
            load_tokens(str(path))


def test_special_tokens_that_the_library_makes_up_are_none(tmp_path: Path) -> None:
    """It gives a Qwen tokenizer the end and padding token of Qwen, with ids that a smaller model does not have."""
    path = tmp_path / "P0"
    folder(path, eos=1)
    said = json.loads((path / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in said.items() if name not in ("eos_token", "pad_token")}
    (path / "tokenizer_config.json").write_text(json.dumps(kept))
    policy = load_policy(str(path), "cpu")
    assert policy.tokenizer.pad_token_id >= ROWS, "else there is nothing to see here"
    assert policy.end_token_ids == [END]
    assert policy.model.generation_config.pad_token_id == END


class TestLargerTokenizers:
    """Tokens beyond the embedding do no harm until a prompt holds one."""

    @pytest.fixture
    def tokens(self, tmp_path: Path) -> Tokens:
        return load_tokens(folder(tmp_path / "P0", eos=1, extra=("#", "$")))

    def test_prompts_without_them_are_taken(self, tokens: Tokens) -> None:
        check = PromptCheck(tokens, 8)
        for number in range(600):
            check({"id": f"p{number}", "prompt": "1+2="})

    @pytest.mark.parametrize("place", [0, 300, 599])
    def test_a_prompt_with_one_is_named_before_the_first_sample(self, tokens: Tokens, place: int) -> None:
        prompts = ["1+2="] * 600
        prompts[place] = "1+2$"
        said = rf"prompt 'p{place}' holds token {tokens.tokenizer.convert_tokens_to_ids('$')} \(\$\), but .*P0 has embeddings"
        with pytest.raises(InputError, match=said):
            room(tokens, 8, prompts)

    @pytest.mark.parametrize("place", [0, 300, 599])
    def test_a_tokenizer_of_another_model_is_found_too(self, tokens: Tokens, place: int) -> None:
        prompts = ["1+2="] * 600
        prompts[place] = "1+2Z"
        with pytest.raises(InputError, match=rf"prompt 'p{place}' holds token {Z} "):
            room(tokens._replace(vocabulary=Z), 8, prompts)

    def test_an_embedding_larger_than_the_tokenizer_is_usual(self, tmp_path: Path) -> None:
        path = tiny_policy.save(tmp_path / "P0")
        model = tiny_policy.model()
        model.resize_token_embeddings(ROWS + 58)
        model.save_pretrained(path)
        tokens = load_tokens(str(path))
        assert tokens.vocabulary == ROWS + 58
        assert encoded_prompt(tokens, {"id": "p", "prompt": "1"}) == [3]


def room(tokens: Tokens, max_tokens: int, prompts: list[Any]) -> None:
    check = PromptCheck(tokens, max_tokens)
    for number, prompt in enumerate(prompts):
        check({"id": f"p{number}", "prompt": prompt})


@pytest.mark.parametrize("place", [0, 255, 256, 999])
@pytest.mark.parametrize("template", [None, chat("Z")], ids=["text", "chat"])
def test_a_prompt_without_room_is_found_wherever_it_is(template: str | None, place: int, tmp_path: Path) -> None:
    tokens = load_tokens(folder(tmp_path / "P0", eos=1, template=template, special="Z"))
    added = len(encoded_prompt(tokens, {"id": "p", "prompt": "1"})) - 1
    longest = 256 - 16 - added
    prompts = ["1+2="] * 1000
    prompts[place] = "1" * longest
    room(tokens, 16, prompts)
    prompts[place] += "1"
    with pytest.raises(
        InputError, match=f"prompt 'p{place}': its 241 tokens and --max-tokens 16 .* to 15, or leave the"
    ):
        room(tokens, 16, prompts)


@pytest.mark.parametrize("positions", [None, 256, 1 << 40])
@pytest.mark.parametrize(
    "prompt", ["1" * (1 << 25), [{"role": "user", "content": "1" * (1 << 25)}]], ids=["text", "messages"]
)
def test_a_book_is_refused_before_it_is_made_into_tokens(prompt: Any, positions: int | None, tmp_path: Path) -> None:
    tokens = load_tokens(folder(tmp_path / "P0", eos=1))._replace(positions=positions)

    class Untouched:
        chat_template = None
        vocab_size = 1
        added_tokens_decoder: ClassVar[dict[int, str]] = {}

        def __call__(self, text: str) -> None:
            raise AssertionError("made into tokens")

    tokens = tokens._replace(tokenizer=Untouched())
    for take in (encoded_prompt, lambda tokens, record: PromptCheck(tokens, 8)(record)):
        with pytest.raises(InputError, match=r"prompt 'p': a text of 33,554,\d+ characters is too long for .*P0"):
            take(tokens, {"id": "p", "prompt": prompt})


def test_most_prompts_are_not_rendered_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cropi_tools.policy import prompts

    path = folder(tmp_path / "P0", eos=1, template=chat("Z"), special="Z", config={"max_position_embeddings": 4096})
    rendered, plain = [], prompts.encoded_prompt
    monkeypatch.setattr(prompts, "encoded_prompt", lambda *given: rendered.append(1) or plain(*given))
    room(load_tokens(path), 1024, ["1+2="] * 5000)
    assert len(rendered) == 256


# family, what its configuration says of positions, the limit
LIMITS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "learned": ("gpt2", {"n_positions": 64}, 64),
    "learned, with two more rows": ("opt", {"max_position_embeddings": 64}, 64),
    "a table of rotary angles": ("gptj", {"n_positions": 64}, 64),
    "rotary": ("llama", {"max_position_embeddings": 64}, 64),
    "Llama 3: extended already": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        64,
    ),
    "linear": ("llama", {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
    "dynamic": ("llama", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 256),
    "YaRN over the original length": (
        "qwen2",
        {
            "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        256,
    ),
    "YaRN, stated": (
        "qwen2",
        {
            "max_position_embeddings": 256,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        256,
    ),
    "a gemma of text and images": ("gemma3", {"text_config": {"max_position_embeddings": 64}}, 64),
    "ALiBi": ("bloom", {}, None),
    "ALiBi by option": ("falcon", {"alibi": True}, None),
    "the same with rotary positions": ("falcon", {"max_position_embeddings": 64}, 64),
    "ALiBi with a length": ("mpt", {"max_seq_len": 64}, None),
    "recurrent": ("mamba", {}, None),
    "recurrent, second kind": ("mamba2", {}, None),
    "recurrent with a context length": ("rwkv", {"context_length": 64}, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_how_many_positions_a_family_has(name: str) -> None:
    family, given, limit = LIMITS[name]
    assert positions(transformers.AutoConfig.for_model(family, **given)) == limit
