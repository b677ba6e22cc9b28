import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from tests.train.tiny import qwen3
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message
from tinyr2.models.load import save_model
from tinyr2.rewards import learned
from tinyr2.rewards.grade import RewardConfig, load_reward
from tinyr2.rewards.learned import RewardModelOptions, compare_readers, reward_model
from tinyr2.tokens.build import COMPACT, train_tokenizer

CORPUS = ["so we add 1 and 2 and get 3", "the answer is 12, not 7"]
PROMPTS = [[{"role": "user", "content": "1+2?"}],
           [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "add 7 and 12"}],
           [{"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "7?"}],
           [{"role": "user", "content": "1+2?"}]]
ANSWERS = ["so we add 1 and 2 and get 3", "19", "7, and then <|im_end|> 12", ""]


def make_folder(folder, *, pad_is_eos=True, **settings):
    tokenizer = train_tokenizer(CORPUS, vocab_size=300)
    tokenizer.pad_token = tokenizer.eos_token if pad_is_eos else tokenizer.pad_token
    torch.manual_seed(2)
    config = Qwen3Config(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=2, num_key_value_heads=1, num_labels=1, initializer_range=0.5,
                         pad_token_id=tokenizer.pad_token_id, **settings)
    model = Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["pad is eos", "pad is not eos"])
def folder(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("rm") / "m", pad_is_eos=request.param)


def stock_scores(folder, prompts, answers):
    """The stock model's logits on each whole text alone; it ends with the end of the turn."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
        ids = tokenizer.encode(text.rstrip("\n"), add_special_tokens=False)
        assert ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():  # without a padding id in the way, which may be the end of the turn
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            scores.append(model.score(hidden).item())
            if tokenizer.pad_token_id != tokenizer.eos_token_id:
                assert model(input_ids=torch.tensor([ids])).logits.item() == pytest.approx(scores[-1], abs=1e-6)
    return scores


def turns(answers):
    return [[{"role": "assistant", "content": answer}] for answer in answers]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_scores_are_the_stock_model_s_on_the_unpadded_text(folder, batch_tokens):
    call = reward_model(RewardModelOptions(path=str(folder), device="cpu", batch_tokens=batch_tokens))
    expected = stock_scores(folder, PROMPTS, ANSWERS)
    assert len({round(score, 3) for score in expected}) == 4
    found = call(prompts=PROMPTS, completions=turns(ANSWERS), completion_ids=[[0]] * 4)
    assert found == pytest.approx(expected, abs=1e-5)
    assert call(prompts=PROMPTS[:1], completions=ANSWERS[:1]) == pytest.approx(expected[:1], abs=1e-5)


def test_the_student_s_token_ids_are_never_read(folder):
    call = load_reward(RewardConfig(name="reward_model", options={"path": str(folder), "device": "cpu"})).call
    prompts, completions = PROMPTS[:1], turns(ANSWERS[:1])
    scores = [call(prompts=prompts, completions=completions, completion_ids=ids, answer=[None])
              for ids in ([[1]], [[9, 9, 9]], [[10 ** 9]])]
    assert scores[0] == scores[1] == scores[2]


def test_weights_are_loaded_at_the_first_call_and_once(folder, monkeypatch):
    loads = []
    real = learned.load_scalar
    monkeypatch.setattr(learned, "load_scalar", lambda *a: loads.append(1) or real(*a))
    call = reward_model(RewardModelOptions(path=str(folder), device="cpu"))
    assert call(prompts=[], completions=[]) == [] and loads == []
    for _ in range(2):
        call(prompts=PROMPTS, completions=turns(ANSWERS))
    assert loads == [1]


def test_a_text_beyond_the_model_s_context_has_no_score(tmp_path):
    folder = make_folder(tmp_path / "m", max_position_embeddings=60)
    call = reward_model(RewardModelOptions(path=str(folder), device="cpu"))
    answers = ["3", "1 2 " * 40]
    found = call(prompts=[PROMPTS[0]] * 2, completions=turns(answers))
    assert found[0] == pytest.approx(stock_scores(folder, PROMPTS[:1], ["3"])[0], abs=1e-5)
    assert found[1] is None
    assert call.unread == 1


def test_a_prompt_that_the_template_cannot_write_has_no_score_unless_none_can_be_written(tmp_path):
    folder = make_folder(tmp_path / "m")
    call = reward_model(RewardModelOptions(path=str(folder), device="cpu"))
    call.tokenizer.chat_template = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
                                    "{% endif %}" + call.tokenizer.chat_template)
    found = call(prompts=PROMPTS, completions=turns(ANSWERS))
    assert [score is None for score in found] == [False, True, False, False]
    with pytest.raises(DataError, match="no system"):
        call(prompts=PROMPTS[1:2], completions=turns(ANSWERS[1:2]))


def edited(folder, tmp_path, **settings):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **settings}))
    return copy


def refuse(path, said):
    with pytest.raises(ConfigError, match=f"rewards: reward_model: .*{said}"):
        load_reward(RewardConfig(name="reward_model", options={"path": str(path)}))


def test_what_cannot_be_a_reward_model_is_refused_before_weights_are_read(folder, tmp_path):
    refuse(tmp_path / "none", "no such model folder")
    refuse(edited(folder, tmp_path / "a", id2label={"0": "a", "1": "b"}), "gives no single number for a text")
    refuse(edited(folder, tmp_path / "b", rope_parameters={
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "its rope_type ties")
    bare = edited(folder, tmp_path / "c")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refuse(bare, "without a tokenizer")
    silent = edited(folder, tmp_path / "d")
    (silent / "chat_template.jinja").unlink()
    refuse(silent, "no chat template")
    save_model(qwen3(), train_tokenizer(CORPUS, vocab_size=300), tmp_path / "causal")
    refuse(tmp_path / "causal", "gives no single number for a text")


ASKS = [[Message("user", "1+2?")], [Message("system", "Be brief."), Message("user", "7?")]]


def test_readers_that_are_alike_have_no_difference():
    ours, theirs = (train_tokenizer(CORPUS, vocab_size=300) for _ in range(2))
    assert compare_readers(ours, theirs, ASKS) == []


def test_the_readers_differences_are_said_in_words():
    ours = train_tokenizer(CORPUS, vocab_size=300)
    theirs = train_tokenizer(["12 7 and " * 3], vocab_size=270, alphabet="bytes")
    theirs.chat_template = ours.chat_template.replace("m['role'] + '", "m['role'] + ':").replace("ant\\n", "ant:\\n")
    theirs.pad_token = theirs.eos_token
    said = compare_readers(ours, theirs, ASKS)
    alone = sorted(set(ours.get_vocab()) - set(theirs.get_vocab()))
    assert any(line.startswith(f"{len(alone)} tokens are in the student's vocabulary alone, e.g. ") for line in said)
    assert "pad_token is '<|endoftext|>' for the student, '<|im_end|>' for the reward model" in said
    assert sum("chat templates differ from character" in line for line in said) == 1
    assert any(line.endswith("for the reward model") and "user:" in line for line in said)


def test_moved_ids_and_other_ends_of_a_turn_are_named():
    ours = train_tokenizer(CORPUS, vocab_size=300)
    theirs = train_tokenizer(CORPUS, vocab_size=300, chat_template=COMPACT)
    said = compare_readers(ours, theirs, ASKS)
    assert "the end of a turn is '<|im_end|>' for the student, '<|end|>' for the reward model" in said
    assert "eos_token is '<|im_end|>' for the student, '<|end|>' for the reward model" in said
    moved = sum(theirs.get_vocab().get(token, i) != i for token, i in ours.get_vocab().items())
    assert moved and any(line.startswith(f"{moved} tokens have other ids, e.g. ") for line in said)


def test_a_template_that_rejects_a_sample_is_a_difference():
    ours, theirs = (train_tokenizer(CORPUS, vocab_size=300) for _ in range(2))
    theirs.chat_template = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                            + theirs.chat_template)
    said, = compare_readers(ours, theirs, ASKS)
    assert said.startswith("one of the chat templates cannot write a sample: ") and "no system" in said
