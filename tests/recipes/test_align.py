"""`tinyr2 align`: figures for two tokenizers on any texts, and for two models on the student's answers."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tokens.makers import byte_level, sentencepiece
from tinyr2.core import config as configs
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Rollout
from tinyr2.models.load import ModelConfig, load_model, load_tokenizer, save_model
from tinyr2.recipes import align_models
from tinyr2.recipes.align import AlignConfig, align, read_texts
from tinyr2.report.console import Console
from tinyr2.rollouts.sample import sample
from tinyr2.tokens.align import Spans
from tinyr2.tokens.chat import render_prompt
from tinyr2.tokens.translate import Translator

MODELS = {"small": (byte_level, 270), "other": (byte_level, 320)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two models with tokenizers of their own, one more tokenizer, and eight problems."""
    folder = tmp_path_factory.mktemp("align")
    for i, (name, (make, size)) in enumerate(MODELS.items()):
        tokenizer = make(size)
        torch.manual_seed(i)
        model = Qwen3ForCausalLM(Qwen3Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            intermediate_size=32, vocab_size=len(tokenizer) + i, max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
        for parameter in model.parameters():  # so that the two disagree
            parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
        save_model(model, tokenizer, folder / name)
    sentencepiece().save_pretrained(folder / "pieces")
    rows = [{"prompt": f"add {a} and 25:", "answer": str(a + 25)} for a in range(8)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(**raw) -> tuple[dict, str]:
    stream = io.StringIO()
    found = align(configs.build(AlignConfig, raw, "tinyr2 align"), Console(stream=stream, plain=True))
    return json.loads(json.dumps(found)), stream.getvalue()


def answers(world: Path, student: str = "small", teacher: str = "other", **models) -> dict:
    raw = {"student": {"path": str(world / student)}, "teacher": {"path": str(world / teacher)}, "device": "cpu",
           "data": {"path": str(world / "problems.jsonl")}, "sampling": {"max_completion_length": 24}} | models
    return {"models": raw}


def test_two_tokenizers_are_compared_on_the_built_in_samples(world):
    found, shown = run(student=str(world / "small"), teacher=str(world / "pieces"))
    assert found["kinds"].keys() == {"prose", "maths", "code", "chinese", "emoji"}
    assert (found["student"], found["same"]) == (str(world / "small"), False)
    for one in (found, *found["kinds"].values()):
        assert one["chunk"]["bytes"] == one["bytes_covered"] <= 1.0
        for unit in ("tokens", "bytes"):
            assert one["mapped"][unit] <= one["exact"][unit] <= one["marginal"][unit] <= one["chunk"][unit]
    assert found["exact"]["tokens"] == pytest.approx(
        sum(k["exact"]["tokens"] * k["size"]["student_tokens"] for k in found["kinds"].values())
        / found["size"]["student_tokens"])
    assert f"{100 * found['exact']['tokens']:.1f}/{100 * found['exact']['bytes']:.1f}" in shown
    for text in ("mapped vocabulary: ", "special tokens by role:", "longest spans:", "\nemoji:\nA ┃"):
        assert text in shown


def test_one_tokenizer_on_both_sides_is_said_to_be_one(world):
    found, shown = run(student=str(world / "small"), teacher=str(world / "small"))
    whole = {"tokens": 1.0, "bytes": 1.0}
    assert (found["same"], found["exact"], found["mapped"], found["marginal"]) == (True, whole, whole, whole)
    assert (found["worst"], found["lost"]) == ([], [])
    assert "A and B are one tokenizer: every token has a partner" in shown


def test_texts_come_from_a_file_and_the_kind_is_its_name(world, tmp_path):
    rows = [{"text": "the cat"}, {"prompt": "the", "completion": "hat", "answer": "no text"},
            {"messages": [{"role": "user", "content": "a mat"}, {"from": "gpt", "value": "12"}]},
            {"question": "how many", "number": 3}]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = ["the cat", "the", "hat", "a mat", "12", "how many"]
    assert read_texts(str(tmp_path / "talk.jsonl"), None) == [("talk", text) for text in wanted]
    assert read_texts(str(tmp_path / "talk.jsonl"), 1) == [("talk", "the cat")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "the cat"}]), tmp_path / "t.parquet")
    assert read_texts(str(tmp_path / "t.parquet"), None) == [("t", "the cat")]
    (tmp_path / "plain.txt").write_text("the cat\n  12\n")
    assert read_texts(str(tmp_path / "plain.txt"), None) == [("plain", "the cat\n  12\n")]
    found, _ = run(student=str(world / "small"), teacher=str(world / "pieces"), data=str(tmp_path / "talk.jsonl"))
    assert found["kinds"].keys() == {"talk"}
    assert found["size"]["bytes"] == len("".join(wanted))


def reference(world: Path, signal: str, max_bias: float = 0.0, **sides: str) -> dict[str, float]:
    """The same shares from whole logits, answer by answer and span by span."""
    raw = answers(world, **sides)["models"]
    config = configs.build(align_models.ModelsConfig, raw, "models")
    (student, mine), (teacher, theirs) = (
        (load_model(m, torch.device("cpu")), load_tokenizer(m)) for m in (config.student, config.teacher))
    translator = Translator(mine, theirs)
    sums = np.zeros(4)  # tokens and bytes kept, spans, |advantage|
    total = np.zeros(2)
    for r in sample(align_models.policy_of(student, mine, translator.student.vocab),
                    align_models.load_problems(config.data), n=1, sampling=config.sampling, seed=0):
        t = translator.translate(r.problem.messages, r.response_ids, prompt_ids=r.prompt_ids)
        ours, ours_mass = scored(student, r.prompt_ids, r.response_ids, translator.student.pieces)
        said, said_mass = scored(teacher, t.prompt_ids, t.response_ids, translator.teacher.pieces)
        spans = t.spans
        if signal == "chunk_debiased":
            spans = spans.merged(np.array([
                ours_mass[(spans.student == k).nonzero()[0][-1]] <= max_bias
                and said_mass[(spans.teacher == k).nonzero()[0][-1]] <= max_bias for k in range(spans.count)], bool))
        sizes = [len(translator.student.pieces[i]) for i in r.response_ids]
        total += [len(sizes), sum(sizes)]
        sums += counted(spans, signal, ours, said, np.array(sizes))
        sums[0] += beside(spans, sizes) if signal == "marginal" else 0
    return {"tokens": sums[0] / total[0], "bytes": sums[1] / total[1], "spans": sums[2], "advantage": sums[3]}


def scored(model, prompt, response, pieces) -> tuple[np.ndarray, np.ndarray]:
    """Of each token its log-prob, and the mass of the tokens whose bytes go on from its own."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1:-1, :len(pieces)]
    logp = logits.double().log_softmax(-1).numpy()
    longer = [[j for j, p in enumerate(pieces) if pieces[i] and p.startswith(pieces[i]) and p != pieces[i]]
              for i in response]
    return (logp[np.arange(len(response)), list(response)],
            np.array([np.exp(logp[k, ids]).sum() for k, ids in enumerate(longer)]))


def beside(spans: Spans, sizes: list[int]) -> int:
    """Special tokens without a counterpart: what the teacher says next belongs in their place, if it says more."""
    return sum(k < 0 and size == 0 and bool((spans.student[i:] >= 0).any())
               for i, (k, size) in enumerate(zip(spans.student, sizes, strict=True)))


def counted(spans: Spans, signal: str, ours, said, sizes) -> np.ndarray:
    many = np.array([[(side == k).sum() != 1 for side in (spans.student, spans.teacher)] for k in range(spans.count)])
    kept = [k for k in range(spans.count) if not (many[k].any() if signal == "exact"
                                                  else many[k, 1] and signal == "marginal")]
    inside = np.isin(spans.student, kept)
    gaps = [said[spans.teacher == k].sum() - ours[spans.student == k].sum() for k in kept]
    return np.array([inside.sum(), sizes[inside].sum(), len(kept), np.abs(gaps).sum()])


def test_the_shares_of_a_students_answers_are_those_of_whole_logits(world):
    found = run(**answers(world, max_bias=0.02))[0]["models"]
    chunk = reference(world, "chunk")
    assert found["mean_abs_advantage"] == pytest.approx(chunk["advantage"] / chunk["spans"], rel=1e-4)
    assert found["mean_abs_advantage"] > 0.1
    for signal in ("exact", "chunk", "chunk_debiased"):
        wanted = reference(world, signal, 0.02)
        assert found[signal] == pytest.approx({
            "tokens": wanted["tokens"], "bytes": wanted["bytes"], "spans": wanted["spans"] / chunk["spans"],
            "advantage": wanted["advantage"] / chunk["advantage"]}, rel=1e-4), signal
    assert 0 < found["exact"]["tokens"] < 1
    assert found["chunk_debiased"]["spans"] < 1
    assert found["mapped"]["advantage"] <= found["exact"]["advantage"]


@pytest.mark.parametrize("sides", [{}, {"student": "other", "teacher": "small"}])
def test_marginal_is_counted_where_the_teacher_has_a_distribution(world, sides):
    found, shown = run(**answers(world, **sides))
    chunk, wanted = reference(world, "chunk", **sides), reference(world, "marginal", **sides)
    assert found["models"]["marginal"] == pytest.approx({
        "tokens": wanted["tokens"], "bytes": wanted["bytes"], "spans": wanted["spans"] / chunk["spans"],
        "advantage": wanted["advantage"] / chunk["advantage"]}, rel=1e-4)
    assert "(marginal: with a distribution)" in shown
    if sides:  # a student with longer tokens than the teacher
        assert found["models"]["exact"]["advantage"] <= found["models"]["marginal"]["advantage"] < 1


def test_a_teacher_that_is_the_student_has_no_advantage_to_share(world, monkeypatch):
    """Of text as the tokenizer itself would write it; random weights write other tokenizations of their bytes."""

    def canonical(policy, problems, **_):
        return [Rollout(problem=p, group=i, sample=0, author="student", finish="length", temperature=1.0,
                        prompt_ids=render_prompt(policy.tokenizer, p.messages),
                        response_ids=tuple(policy.tokenizer.encode("the cat sat on 12 mats")))
                for i, p in enumerate(problems)]

    monkeypatch.setattr(align_models, "sample", canonical)
    found, shown = run(**answers(world, teacher="small"))
    assert found["same"]
    assert found["models"]["mean_abs_advantage"] == 0.0
    assert [found["models"][s]["advantage"] for s in align_models.SIGNALS] == [None] * 5
    assert [found["models"][s]["tokens"] for s in align_models.SIGNALS] == [1.0] * 5
    assert "–" in shown


def test_a_teacher_whose_context_no_answer_fits_is_refused(world, monkeypatch):
    assert run(**answers(world))[0]["models"]["answers"] == 8
    monkeypatch.setattr(align_models, "context_length", lambda _: 4)
    with pytest.raises(DataError, match="no answer fits its context of 4 tokens; lower --max-completion-length"):
        run(**answers(world))


def test_models_bring_their_tokenizers_and_a_and_b_go_before_them(world):
    found, _ = run(**answers(world))
    assert (found["student"], found["teacher"]) == (str(world / "small"), str(world / "other"))
    with pytest.raises(ConfigError, match=r"small: the model has \d+ ids, its tokenizer writes \d+; give the"):
        run(student=str(world / "other"), **answers(world))


def test_a_folder_that_is_not_there_or_holds_no_tokenizer_is_refused(world, tmp_path):
    with pytest.raises(DataError, match="no such folder; did you mean small.*give a folder with tokenizer.json"):
        run(student=str(world / "smal"), teacher=str(world / "small"))
    with pytest.raises(DataError, match="no tokenizer there; give a folder with tokenizer.json"):
        run(student=str(world / "small"), teacher=str(tmp_path))


def test_a_tokenizer_that_cannot_round_trip_is_refused(world, tmp_path):
    broken = byte_level(320)
    state = json.loads(broken.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a"}
    broken.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="the tokenizer cannot round-trip: .* mend the normalizer"):
        run(student=str(world / "small"), teacher=str(tmp_path))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.txt", None, "no such file; looked in"),
    ("none.jsonl", None, "no such file"),
    ("a.csv", "a,b", "a .jsonl or .parquet file"),
    ("bad.txt", b"\xff\xfe", r"not UTF-8 \(byte 1\); save the file as UTF-8"),
    ("bad.jsonl", '{"number": 3}\n', "line 1: no text; a row has text, prompt, completion or messages"),
    ("turns.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: no text"),
    ("empty.txt", "", "not one byte"),
])
def test_data_without_text_is_refused_with_its_place(world, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        run(student=str(world / "small"), teacher=str(world / "pieces"), data=str(tmp_path / name))


def test_settings_that_cannot_be_meant_are_refused(world):
    with pytest.raises(ConfigError, match="no tokenizer of the teacher: give A and B"):
        run(student=str(world / "small"))
    with pytest.raises(ConfigError, match="temperature 0 draws nothing"):
        run(**answers(world, sampling={"temperature": 0.0}))


def test_a_model_config_names_its_folder():
    assert configs.build(AlignConfig, answers(Path("w")), "align").sides == (
        ModelConfig(path="w/small").path, ModelConfig(path="w/other").path)
