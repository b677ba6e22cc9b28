import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinyr2.core.errors import DataError
from tinyr2.core.types import Message
from tinyr2.tokens.build import CHATML, COMPACT, train_tokenizer
from tinyr2.tokens.chat import (
    decode,
    end_of_turn,
    fingerprint,
    render_example,
    render_prompt,
    stop_ids,
    token_texts,
    vocabulary_faults,
)

SHARED = Path(os.environ.get("TINYR2_SHARED", Path(__file__).parents[3] / "shared")) / "tokenizers"
REAL = ("gpt2", "cl100k", "o200k", "minimind")
CORPUS = ["the cat sat on the mat and the answer is 12", "User: two plus two?\nAssistant: 4\n", "hello " * 20]

ASK = (Message("user", "2+2?"),)
CHAT = (Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4"), Message("user", "3+3?"))

# The opening writes "<think>", and a rendered answer has lost its thoughts: DeepSeek-R1's way.
OPENS_THOUGHT = ("{% for m in messages %}{% if m['role'] == 'assistant' %}"
                 "{{ '<|im_start|>' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
                 "{% else %}{{ '<|im_end|>' + m['content'] }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|><think>\\n' }}{% endif %}")
# As above, but the prompt does not open the thought itself.
CUTS_THOUGHT = OPENS_THOUGHT.replace("<think>\\n", "")
# The system text goes to the last turn if that is the user's: Mistral's way.
MOVES_SYSTEM = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>' }}"
                "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
                "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}"
                "{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}")
# Nothing closes an answer but the line's end.
PLAIN = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def tokenizer_with(template=CHATML, **settings):
    tokenizer = train_tokenizer(CORPUS, vocab_size=300)
    tokenizer.chat_template = template
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="module", params=REAL)
def real(request):
    if not (SHARED / request.param).is_dir():
        pytest.skip(f"{SHARED} has no {request.param}")
    return AutoTokenizer.from_pretrained(SHARED / request.param)


def answer(text):
    return (Message("assistant", text),)


def whole(tokenizer, pair):
    return tokenizer.decode([*pair[0], *pair[1]])


def test_prompt_has_every_turn_and_the_opening_of_the_answer():
    tokenizer = tokenizer_with()
    assert tokenizer.decode(render_prompt(tokenizer, CHAT)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n")


def test_response_ends_with_the_end_token_and_leaves_out_what_the_template_writes_after_it():
    tokenizer = tokenizer_with()
    prompt, response = render_example(tokenizer, ASK, answer("4"))
    assert tokenizer.decode(response) == "4<|im_end|>"
    assert response[-1] == tokenizer.eos_token_id == end_of_turn(tokenizer)
    assert prompt == render_prompt(tokenizer, ASK)


def test_eos_is_appended_where_the_template_writes_no_end_token():
    tokenizer = tokenizer_with(PLAIN)
    pair = render_example(tokenizer, ASK, answer("4\nyes"))
    assert whole(tokenizer, pair) == "user: 2+2?\nassistant: 4\nyes<|im_end|>"
    assert end_of_turn(tokenizer) is None
    assert stop_ids(tokenizer, None) == (tokenizer.eos_token_id,)


def test_the_end_token_is_learned_although_padding_has_the_same_id():
    tokenizer = tokenizer_with(pad_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert render_example(tokenizer, ASK, answer("4"))[1][-1] == tokenizer.eos_token_id


def test_an_answer_that_quotes_the_end_token_is_not_cut_at_the_quotation():
    tokenizer = tokenizer_with()
    assert tokenizer.decode(render_example(tokenizer, ASK, answer("a<|im_end|>b"))[1]) == "a<|im_end|>b<|im_end|>"


def test_bos_stands_once_though_template_and_tokenizer_both_would_write_it():
    tokenizer = tokenizer_with("{{ bos_token }}" + CHATML, bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert tokenizer.encode("x")[0] == 0
    prompt, response = render_example(tokenizer, ASK, answer("4"))
    assert (prompt + response).count(0) == 1
    assert prompt[0] == 0


def test_prompt_and_response_are_tokenized_apart_where_they_would_share_a_token():
    tokenizer = tokenizer_with(PLAIN)
    prompt, response = render_example(tokenizer, ASK, answer("the cat"))
    assert tokenizer.convert_ids_to_tokens(prompt[-1]) == "Ġ"
    assert tokenizer.decode(response) == "the cat<|im_end|>"
    assert prompt == render_prompt(tokenizer, ASK)


def test_a_thought_that_the_prompt_opens_is_neither_lost_nor_opened_twice():
    tokenizer = tokenizer_with(OPENS_THOUGHT)
    pair = render_example(tokenizer, ASK, answer("<think>\ntwo\n</think>\n4"))
    assert whole(tokenizer, pair) == "<|im_end|>2+2?<|im_start|><think>\ntwo\n</think>\n4<|im_end|>"


def test_a_thought_that_the_template_cuts_is_put_back():
    tokenizer = tokenizer_with(CUTS_THOUGHT)
    pair = render_example(tokenizer, ASK, answer("<think>two</think>4"))
    assert whole(tokenizer, pair) == "<|im_end|>2+2?<|im_start|><think>two</think>4<|im_end|>"


def test_an_answer_without_the_thought_that_the_prompt_opens_is_refused():
    with pytest.raises(DataError, match=r"opens an answer with '<think>\\n'.*'4'"):
        render_example(tokenizer_with(OPENS_THOUGHT), ASK, answer("4"))


def test_a_template_that_moves_the_system_turn_still_gives_prompt_and_answer():
    tokenizer = tokenizer_with(MOVES_SYSTEM)
    pair = render_example(tokenizer, (Message("system", "Be brief."), *ASK), answer("4"))
    assert whole(tokenizer, pair) == "<|im_start|>Be brief. 2+2?[/INST] 4<|im_end|>"


@pytest.mark.parametrize(("template", "messages", "said"), [
    (None, ASK, "no chat template; add"),
    (CHATML, (Message("system", "hi"),), "no user turn"),
    (COMPACT, (Message("tool", "hi"), *ASK), r"rejects the roles \['tool', 'user'\].*system, user and assistant"),
    ("{% for m in %}", ASK, "rejects the roles"),
])
def test_a_prompt_that_cannot_be_rendered_says_why(template, messages, said):
    with pytest.raises(DataError, match=said):
        render_prompt(tokenizer_with(template), messages)


@pytest.mark.parametrize(("template", "completion", "said"), [
    (CHATML, (Message("user", "4"),), r"one assistant turn.*\['user'\]"),
    (CHATML, (*answer("4"), *answer("5")), "one assistant turn"),
    ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", answer("4"), "leaves out"),
    ("{% for m in messages %}{{ m['content'] }}{% if '4' not in m['content'] %}<|im_end|>{% endif %}{% endfor %}",
     answer("4"), "closes this answer otherwise"),
])
def test_a_completion_that_cannot_be_rendered_says_why(template, completion, said):
    with pytest.raises(DataError, match=said):
        render_example(tokenizer_with(template), ASK, completion)


def test_a_tokenizer_that_adds_a_space_before_every_text_is_refused_where_that_would_show():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=100, special_tokens=["</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = PLAIN.replace("'assistant: '", "'assistant:'")
    assert tokenizer.decode(render_example(tokenizer, ASK, answer("cat"))[1]) == "cat</s>"
    tokenizer.chat_template = PLAIN
    with pytest.raises(DataError, match="cannot be tokenized apart from the prompt, which ends with .*assistant: "):
        render_example(tokenizer, ASK, answer("cat"))


def test_without_eos_and_end_token_nothing_can_stop_an_answer():
    tokenizer = tokenizer_with(PLAIN, eos_token=None)
    with pytest.raises(DataError, match="nothing ends an answer"):
        render_example(tokenizer, ASK, answer("4"))
    with pytest.raises(DataError, match="nothing ends an answer"):
        stop_ids(tokenizer, None)


def test_stop_ids_are_eos_then_the_generation_config_s_then_the_end_of_turn():
    tokenizer = tokenizer_with(eos_token="<|endoftext|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(tokenizer, None) == (0, end)
    assert stop_ids(tokenizer, [9, 0]) == (0, 9, end)
    assert stop_ids(tokenizer, end) == (0, end)


def test_stop_ids_need_no_chat_template():
    assert stop_ids(tokenizer_with(None), 7) == (tokenizer_with().eos_token_id, 7)


def test_decode_drops_special_tokens_and_changes_nothing_else():
    tokenizer = tokenizer_with()
    ids = tokenizer.encode(" a , b ?\n<|im_end|>", add_special_tokens=False)
    assert decode(tokenizer, ids) == " a , b ?\n"


def test_token_texts_show_lone_bytes_in_hex_and_special_tokens_by_name():
    tokenizer = tokenizer_with()
    assert token_texts(tokenizer, tokenizer.encode("1é<|im_end|>", add_special_tokens=False)) == [
        "1", "\\xc3", "\\xa9", "<|im_end|>"]
    assert token_texts(tokenizer, [999]) == ["<|id 999|>"]


def test_fingerprint_changes_with_each_part_and_not_with_the_last_call():
    tokenizer = tokenizer_with()
    first = fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == first == fingerprint(tokenizer_with())
    assert len({first, fingerprint(tokenizer_with(PLAIN)), fingerprint(tokenizer_with(eos_token="<|endoftext|>")),
                fingerprint(train_tokenizer(CORPUS, vocab_size=270))}) == 4


def test_vocabulary_faults_name_moved_and_missing_tokens():
    ours = tokenizer_with()
    assert vocabulary_faults(ours, tokenizer_with(PLAIN)) == []
    theirs = train_tokenizer(CORPUS, vocab_size=300)
    theirs.add_tokens(["<think>"])
    assert vocabulary_faults(ours, theirs) == [f"1 tokens are the teacher's alone, e.g. '<think>' ({len(ours)})"]
    other = train_tokenizer(CORPUS, vocab_size=300, chat_template=COMPACT)
    faults = vocabulary_faults(ours, other)
    assert faults[0].endswith(f"tokens have different ids, e.g. '!': student 3, teacher {other.get_vocab()['!']}")
    assert "'<|im_start|>' (1), '<|im_end|>' (2)" in faults[1]
    assert "'<|user|>' (1)" in faults[2]


def test_real_tokenizers_render_chats_as_their_templates_do(real):
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    text = real.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt, response = render_example(real, CHAT, answer("6 apples 你好"))
    assert real.decode(prompt) == text
    assert prompt == render_prompt(real, CHAT)
    assert decode(real, response) == "6 apples 你好"
    assert response[-1] == real.eos_token_id
    assert set(response[:-1]).isdisjoint(real.all_special_ids)
    assert stop_ids(real, real.eos_token_id) == (real.eos_token_id,)
    closed = real.apply_chat_template([*chat, {"role": "assistant", "content": "6 apples 你好"}], tokenize=False)
    assert closed.rstrip("\n") == real.decode([*prompt, *response])


def test_real_tokenizers_show_every_byte_of_a_split_character(real):
    ids = real.encode("x 😀", add_special_tokens=False)
    shown = "".join(token_texts(real, ids))
    assert shown in ("x 😀", "x \\xf0\\x9f\\x98\\x80")


def test_real_pad_equal_to_eos_still_ends_every_response_with_eos():
    if not (SHARED / "gpt2").is_dir():
        pytest.skip(f"{SHARED} has no gpt2")
    gpt2 = AutoTokenizer.from_pretrained(SHARED / "gpt2")
    assert gpt2.pad_token_id == gpt2.eos_token_id
    prompt, response = render_example(gpt2, ASK, answer("4"))
    assert (gpt2.decode(prompt), gpt2.decode(response)) == ("User: 2+2?Assistant: ", "4<|endoftext|>")
