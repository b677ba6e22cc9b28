"""Checkpoints: bit for bit, whole or not at all, and never the last good one lost."""

import builtins
import errno
import hashlib
import json
import os
import resource
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.errors import RunError
from tinyr2.core.files import MANIFEST, sha256
from tinyr2.core.rng import derive
from tinyr2.train import state as module
from tinyr2.train.optim import Joint
from tinyr2.train.state import CheckpointSkipped, TrainState, load, save

IDENTITY = {"config": "c0ffee", "data": "f00d"}


class Counted(nn.Module):
    """A small net with a persistent buffer that training moves, and one that is not kept."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.skewed = nn.Parameter(torch.randn(4, 3).T)  # not contiguous
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x):
        self.seen += 1
        return (self.body(x) * self.table + x @ self.skewed.T).tanh() * (1 + 0.1 * self.seen)


def qwen3(seed: int, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                                        max_position_embeddings=32, tie_word_embeddings=tied))


def counted(seed: int) -> Counted:
    torch.manual_seed(seed)
    return Counted()


def matrices(model: nn.Module, two: bool) -> list[nn.Parameter]:
    return [p for p in model.parameters() if (p.ndim == 2) == two]


def adamw(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": matrices(model, True), "weight_decay": 0.1},
                              {"params": matrices(model, False), "weight_decay": 0.0}], lr=0.01, **settings)


def muon_and_adamw(model: nn.Module) -> Joint:
    return Joint([torch.optim.Muon(matrices(model, True), lr=0.01), torch.optim.AdamW(matrices(model, False), lr=0.01)])


def lora(seed: int) -> nn.Module:
    model = qwen3(0)  # the frozen weights are the same in every process: identity names them
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


KINDS = {
    "adamw": (counted, adamw),
    "adamw amsgrad": (counted, lambda m: adamw(m, amsgrad=True)),
    "adamw with a tensor rate": (counted, lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01))),
    "muon": (lambda s: nn.Linear(4, 3, bias=False), lambda m: torch.optim.Muon(m.parameters(), lr=0.01)),
    "muon and adamw": (counted, muon_and_adamw),
    "sgd": (counted, lambda m: torch.optim.SGD(m.parameters(), lr=0.01)),
    "sgd momentum": (counted, lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)),
    "adamw bfloat16": (lambda s: counted(s).bfloat16(), adamw),
    "qwen3 tied": (qwen3, muon_and_adamw),
    "qwen3 lora": (lora, lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)),
}


def fresh(kind: str = "adamw", seed: int = 0) -> TrainState:
    build, optimize = KINDS[kind]
    model = build(seed)
    return TrainState(model=model, optimizer=optimize(model), identity=dict(IDENTITY))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """A loss that depends on weights and step alone."""
    draw = torch.Generator().manual_seed(derive(0, "data", step))
    if hasattr(model, "config"):
        tokens = torch.randint(0, 32, (2, 8), generator=draw)
        return model(input_ids=tokens, labels=tokens).loss
    x = torch.randn(5, 4, generator=draw).to(next(model.parameters()).dtype)
    return (model(x) - 0.5).square().mean()


def advance(state: TrainState, run: Path, steps: int) -> None:
    """Train; every field of the state has a hand in the weights or in the log."""
    path = run / "metrics.jsonl"
    path.touch()
    os.truncate(path, state.logs.get("metrics.jsonl", 0))
    for _ in range(steps):
        loss = loss_of(state.model, state.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), state.monitor.get("norm", 1.0)).item()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step, state.num_tokens = state.step + 1, state.num_tokens + 10
        state.monitor["norm"] = 0.5 * state.monitor.get("norm", 1.0) + 0.5 * norm
        with open(path, "a") as log:
            log.write(json.dumps([state.step, state.num_tokens, loss.item()]) + "\n")
        state.logs["metrics.jsonl"] = path.stat().st_size


def content(state: TrainState) -> str:
    """A digest of all that a state holds: bytes, dtypes, shapes and values."""
    names = {p: name for name, p in state.model.named_parameters()}
    groups = [{k: [names[p] for p in v] if k == "params" else v for k, v in g.items()}
              for g in state.optimizer.param_groups]
    slots = {f"{names[p]} {k}": v for p, kept in state.optimizer.state.items() for k, v in kept.items()}
    tensors = {**state.model.state_dict(), **slots}
    plain = [getattr(state, name) for name in module.PLAIN]
    parts = [repr(groups), repr(plain), *(f"{k} {exact(tensors[k])}" for k in sorted(tensors))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def exact(value) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {value.device} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"


def quiet(message: str) -> None:
    pytest.fail(f"unexpected: {message}")


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def reseal(folder: Path) -> None:
    """Make the manifest agree with what lies in the folder now."""
    names = [n for n in entries(folder) if n != MANIFEST]
    found = {n: {"size": (folder / n).stat().st_size, "sha256": sha256(folder / n)} for n in names}
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "files": found}))


@pytest.fixture
def three(tmp_path) -> tuple[Path, list[str], TrainState]:
    """Checkpoints 1, 2 and 3, the digests of these states, and the state at 3."""
    state, digests = fresh(), []
    for _ in range(3):
        advance(state, tmp_path, 1)
        save(tmp_path / "checkpoints", state, keep=3)
        digests.append(content(state))
    return tmp_path / "checkpoints", digests, state


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_is_the_saved_one_to_the_bit_and_goes_on_like_it(tmp_path, kind):
    state = fresh(kind)
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr"] * 2  # as a schedule would
    advance(state, tmp_path, 2)
    folder = save(tmp_path / "checkpoints", state)
    saved = content(state)
    resumed = fresh(kind, seed=1)
    assert content(resumed) != saved
    assert load(tmp_path / "checkpoints", resumed, say=quiet) == folder
    assert content(resumed) == saved

    advance(state, tmp_path, 3)
    undisturbed = (tmp_path / "metrics.jsonl").read_bytes()
    advance(resumed, tmp_path, 3)
    assert content(resumed) == content(state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed


def test_a_checkpoint_before_the_first_step_empties_a_used_optimizer(tmp_path):
    state, used = fresh(), fresh()
    save(tmp_path / "checkpoints", state)
    advance(used, tmp_path, 1)
    load(tmp_path / "checkpoints", used, say=quiet)
    assert content(used) == content(state) and not used.optimizer.state


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    state = fresh("qwen3 tied")
    advance(state, tmp_path, 1)
    stored = load_file(save(tmp_path / "checkpoints", state) / "model.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    resumed = fresh("qwen3 tied", seed=1)
    load(tmp_path / "checkpoints", resumed, say=quiet)
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    assert torch.equal(resumed.model.lm_head.weight, state.model.lm_head.weight)


def test_untied_weights_are_both_stored(tmp_path):
    model = qwen3(0, tied=False)
    state = TrainState(model=model, optimizer=adamw(model))
    stored = load_file(save(tmp_path / "checkpoints", state) / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.lm_head.weight)
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_lora_stores_the_adapters_alone_and_leaves_the_base_untouched(tmp_path):
    state = fresh("qwen3 lora")
    advance(state, tmp_path, 1)
    stored = load_file(save(tmp_path / "checkpoints", state) / "model.safetensors")
    trained = {name for name, p in state.model.named_parameters() if p.requires_grad}
    assert stored.keys() == trained and all("lora_" in name for name in stored)
    other = fresh("qwen3 lora", seed=1)
    base = {n: p.clone() for n, p in other.model.named_parameters() if not p.requires_grad}
    load(tmp_path / "checkpoints", other, say=quiet)
    assert all(torch.equal(p, dict(other.model.named_parameters())[n]) for n, p in base.items())


def test_slots_keep_their_own_dtype_beside_parameters_of_another(tmp_path):
    state, resumed = fresh("adamw bfloat16"), fresh("adamw bfloat16", seed=1)
    advance(state, tmp_path, 1)
    for slots in state.optimizer.state.values():
        slots["exp_avg"] = slots["exp_avg"].float() + 1e-6  # more than bfloat16 can hold
    save(tmp_path / "checkpoints", state)
    load(tmp_path / "checkpoints", resumed, say=quiet)
    assert content(resumed) == content(state)


def test_slots_are_laid_out_like_their_parameters_in_aligned_memory(tmp_path):
    state, resumed = fresh(), fresh(seed=1)
    advance(state, tmp_path, 1)
    save(tmp_path / "checkpoints", state)
    load(tmp_path / "checkpoints", resumed, say=quiet)
    assert resumed.optimizer.state[resumed.model.skewed]["exp_avg"].stride() == (1, 3) == state.model.skewed.stride()
    slots = [slot for kept in resumed.optimizer.state.values() for slot in kept.values()]
    assert len(slots) == 9 and all(slot.data_ptr() % 64 == 0 for slot in slots)


def test_odd_values_survive(tmp_path):
    state, resumed = fresh(), fresh(seed=1)
    with torch.no_grad():
        state.model.body.weight.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    state.monitor = {"worst": float("inf"), "history": [1, 0.1, None, True, "x"], "inner": {"a": {"b": []}}}
    save(tmp_path / "checkpoints", state)
    load(tmp_path / "checkpoints", resumed, say=quiet)
    assert content(resumed) == content(state)


@pytest.mark.parametrize("monitor", [{1: "int key"}, {"tuple": (1, 2)}])
def test_a_monitor_that_json_would_change_is_caught_when_it_is_saved(tmp_path, monitor):
    state = fresh()
    state.monitor = monitor
    with pytest.raises(AssertionError, match="would not come back"):
        save(tmp_path / "checkpoints", state)


def test_an_optimizer_whose_state_is_a_copy_is_caught(tmp_path):
    class Copying:
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

        @property
        def state(self):
            return dict(self.inner.state)

    state = fresh()
    advance(state, tmp_path, 1)
    save(tmp_path / "checkpoints", state)
    other = fresh()
    other.optimizer = Copying(other.optimizer)
    with pytest.raises(AssertionError, match="is a copy"):
        load(tmp_path / "checkpoints", other, say=quiet)


@pytest.mark.parametrize("lost", ["model", "buffer", "step", "num_tokens", "logs", "monitor", "learning rate",
                                  "slot step", "slot exp_avg", "slot exp_avg_sq"])
def test_a_run_that_resumes_without_one_field_ends_elsewhere(tmp_path, lost):
    straight = fresh()
    advance(straight, tmp_path, 2)
    straight.optimizer.param_groups[0]["lr"] = 0.02
    save(tmp_path / "checkpoints", straight)
    advance(straight, tmp_path, 3)
    undisturbed = content(straight), (tmp_path / "metrics.jsonl").read_bytes()

    resumed, start = fresh(), fresh()
    load(tmp_path / "checkpoints", resumed, say=quiet)
    if lost == "model":
        resumed.model.body.load_state_dict(start.model.body.state_dict())
    elif lost == "buffer":
        resumed.model.seen.copy_(start.model.seen)
    elif lost == "learning rate":
        resumed.optimizer.param_groups[0]["lr"] = start.optimizer.param_groups[0]["lr"]
    elif lost.startswith("slot"):
        for slots in resumed.optimizer.state.values():
            slots[lost.removeprefix("slot ")].zero_()
    else:
        setattr(resumed, lost, getattr(start, lost))
    advance(resumed, tmp_path, 3)
    assert (content(resumed), (tmp_path / "metrics.jsonl").read_bytes()) != undisturbed


def keys_of(value, path=()):
    """Every dict key inside a JSON value, as a path; what lies in `logs` and `monitor` is the caller's own."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict):
            yield (*path, key)
        if path + (key,) not in (("logs",), ("monitor",)):
            yield from keys_of(inner, (*path, key))


def test_a_state_file_without_any_one_of_its_keys_is_refused_by_name(three):
    checkpoints, _, state = three
    path = checkpoints / "step-00000003" / "state.json"
    good = json.loads(path.read_text())
    before = content(state)
    paths = list(keys_of(good))
    assert {p[0] for p in paths} == {"schema", "step", "num_tokens", "logs", "monitor", "identity", "optimizer"}
    for route in paths:
        changed = deepcopy(good)
        holder = changed
        for key in route[:-1]:
            holder = holder[key]
        del holder[route[-1]]
        path.write_text(json.dumps(changed))
        reseal(path.parent)
        with pytest.raises(RunError) as raised:
            load(checkpoints, state, say=quiet)
        assert route[-1] in str(raised.value), route
    assert content(state) == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_tensor_that_is_missing_or_too_many_is_refused_by_name(three, name):
    checkpoints, digests, state = three
    path = checkpoints / "step-00000003" / name
    good = {key: t.clone() for key, t in load_file(path).items()}
    assert len(good) in (4, 9)
    for key in good:
        save_file({k: t for k, t in good.items() if k != key}, path)
        reseal(path.parent)
        with pytest.raises(RunError, match=f"{name}.*missing.*{key}"):
            load(checkpoints, state, say=quiet)
    save_file(good | {"stranger": torch.zeros(1)}, path)
    reseal(path.parent)
    with pytest.raises(RunError, match="stranger"):
        load(checkpoints, state, say=quiet)
    assert content(state) == digests[2]


def test_a_model_of_another_shape_dtype_or_grouping_is_refused_and_left_alone(three):
    checkpoints, _, _ = three
    narrow = fresh()
    narrow.model.body.weight = nn.Parameter(torch.zeros(3, 5))
    narrow.optimizer = adamw(narrow.model)
    grouped = fresh()
    grouped.optimizer = torch.optim.AdamW(grouped.model.parameters(), lr=0.01)
    for state, message in [(narrow, r"body.weight is torch.float32 \(3, 4\) there and torch.float32 \(3, 5\) here"),
                           (fresh("adamw bfloat16"), "torch.float32.*there and torch.bfloat16.*here"),
                           (grouped, r"hold \[2, 1\] parameters there, \[3\] here")]:
        before = content(state)
        with pytest.raises(RunError, match=message):
            load(checkpoints, state, say=quiet)
        assert content(state) == before


def test_another_identity_is_refused_naming_both_values(three):
    checkpoints, _, _ = three
    other = fresh()
    other.identity = {"config": "beef", "data": "f00d", "teacher": "7ea"}
    with pytest.raises(RunError) as raised:
        load(checkpoints, other, say=quiet)
    assert "config: 'c0ffee' in the checkpoint, 'beef' now" in str(raised.value)
    assert "teacher: None in the checkpoint, '7ea' now" in str(raised.value)
    assert "data" not in str(raised.value)
    assert entries(checkpoints) == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "zeroed", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_is_set_aside_loudly_and_the_one_before_is_used(three, name, damage):
    checkpoints, digests, _ = three
    path = checkpoints / "step-00000003" / name
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:middle], "zeroed": bytes(len(data)),
                          "flipped": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1:]}[damage])
    state, said = fresh(seed=1), []
    assert load(checkpoints, state, say=said.append) == checkpoints / "step-00000002"
    assert content(state) == digests[1]
    assert entries(checkpoints) == ["step-00000001", "step-00000002", "step-00000003.corrupt"]
    # A flipped bit of the manifest shows in the file that it no longer describes.
    assert len(said) == 1 and "step-00000003 is damaged" in said[0]
    assert name in said[0] or (name, damage) == (MANIFEST, "flipped")


def test_a_run_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    assert load(tmp_path / "checkpoints", fresh(), say=quiet) is None


def test_a_run_with_damaged_checkpoints_only_says_that_it_starts_over(three):
    checkpoints, _, _ = three
    (checkpoints / "step-00000003.corrupt").mkdir()
    for folder in checkpoints.iterdir():
        (folder / "state.json").write_text("")
    state, said = fresh(seed=1), []
    before = content(state)
    assert load(checkpoints, state, say=said.append) is None
    assert content(state) == before
    assert len(said) == 4 and "no good checkpoint is left, 3 were damaged" in said[3]
    assert entries(checkpoints) == ["step-00000001.corrupt", "step-00000002.corrupt", "step-00000003.corrupt",
                                    "step-00000003.corrupt.1"]


def test_rotation_keeps_the_newest_and_counts_the_good_ones_only(three, tmp_path):
    checkpoints, _, state = three
    (checkpoints / "step-00000003" / "model.safetensors").write_bytes(b"")
    advance(state, tmp_path, 1)
    save(checkpoints, state, keep=2)
    assert entries(checkpoints) == ["step-00000002", "step-00000003", "step-00000004"]
    advance(state, tmp_path, 1)
    save(checkpoints, state, keep=2)
    assert entries(checkpoints) == ["step-00000004", "step-00000005"]
    save(checkpoints, state, keep=1)
    assert entries(checkpoints) == ["step-00000005"]


def test_steps_are_ordered_by_number_beyond_eight_digits(tmp_path):
    state = fresh()
    for step in (99_999_999, 100_000_000):
        state.step = step
        save(tmp_path / "checkpoints", state)
    assert load(tmp_path / "checkpoints", state, say=quiet).name == "step-100000000"


def test_a_step_that_stands_is_not_written_again_unless_damaged_or_another_runs(three):
    checkpoints, _, state = three
    folder = checkpoints / "step-00000003"
    written = (folder / MANIFEST).stat().st_mtime_ns
    assert save(checkpoints, state, keep=3) == folder and (folder / MANIFEST).stat().st_mtime_ns == written
    (folder / "state.json").write_text("{}")
    save(checkpoints, state, keep=3)
    assert load(checkpoints, state, say=quiet) == folder
    assert "step-00000003.corrupt" in entries(checkpoints)
    state.identity["data"] = "other"
    with pytest.raises(RunError, match="belongs to another run: data"):
        save(checkpoints, state, keep=3)


def test_leftovers_of_dead_attempts_are_removed_by_the_next_save_and_load(three):
    checkpoints, _, state = three
    for action in (lambda: save(checkpoints, state, keep=3), lambda: load(checkpoints, state, say=quiet)):
        (checkpoints / ".tmp-3-dead" / "inner").mkdir(parents=True)
        action()
        assert entries(checkpoints) == ["step-00000001", "step-00000002", "step-00000003"]


def test_too_little_space_skips_the_checkpoint_before_anything_is_written(three, tmp_path, monkeypatch):
    checkpoints, digests, state = three
    advance(state, tmp_path, 1)
    size = sum(p.stat().st_size for p in (checkpoints / "step-00000003").iterdir())
    monkeypatch.setattr(module, "free_bytes", lambda path: size // 2)
    with pytest.raises(CheckpointSkipped, match="MiB are needed"):
        save(checkpoints, state, keep=1)
    assert entries(checkpoints) == ["step-00000001", "step-00000002", "step-00000003"]
    other = fresh(seed=1)
    load(checkpoints, other, say=quiet)
    assert content(other) == digests[2]
    monkeypatch.setattr(module, "free_bytes", lambda path: 2 * size)
    assert save(checkpoints, state, keep=1).name == "step-00000004"


def test_a_file_that_the_system_refuses_to_grow_skips_the_checkpoint(three, tmp_path):
    checkpoints, digests, state = three
    advance(state, tmp_path, 1)
    state.model.body.register_buffer("ballast", torch.zeros(20_000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, old[1]))
    try:
        with pytest.raises(CheckpointSkipped, match="File too large"):
            save(checkpoints, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert entries(checkpoints) == ["step-00000001", "step-00000002", "step-00000003"]
    other = fresh(seed=1)
    load(checkpoints, other, say=quiet)
    assert content(other) == digests[2]


class Crash(BaseException):
    """The machine stops here: nothing in the library catches this."""


class Disk:
    """Every file operation of the library, counted; operation number `at` fails with `error`, done or not done.

    A crash may be a loss of power: files that were never synced are then empty afterwards. Nothing is really synced.
    """

    OPERATIONS = ((os, "mkdir"), (os, "open"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"),
                  (os, "rmdir"), (builtins, "open"), (module, "save_file"))
    WRITING = ("mkdir", "fsync", "save_file")

    def __init__(self, folder: Path, at: int | None = None, done: bool = False, error: BaseException | None = None,
                 lasting: bool = False):
        self.folder, self.at, self.done, self.error, self.lasting = folder, at, done, error, lasting
        self.log, self.safe = [], {p.stat().st_ino for p in folder.rglob("*")}

    def run(self, patch: pytest.MonkeyPatch, action) -> BaseException | None:
        """What came out of the action, if anything."""
        with patch.context() as inside:
            for owner, name in self.OPERATIONS:
                inside.setattr(owner, name, self.counted(name, getattr(owner, name)))
            try:
                action()
            except (Crash, CheckpointSkipped) as error:
                caught = error
            else:
                return None
        if isinstance(caught, Crash):
            self.lose_power()
        return caught

    def counted(self, name: str, real):
        def operation(*args, **kwargs):
            number = len(self.log)
            self.log.append(name)
            hit = number == self.at or (self.lasting and number > self.at and name in self.WRITING)
            if hit and not self.done:
                raise self.error
            result = None
            try:
                result = self.sync(args[0]) if name == "fsync" else real(*args, **kwargs)
            finally:  # an operation that fails by itself (mkdir of what is there) is over too
                if hit and name == "open" and result is not None:
                    os.close(result) if isinstance(result, int) else result.close()
                if hit:
                    raise self.error
            return result
        return operation

    def sync(self, handle: int) -> None:
        self.safe.add(os.fstat(handle).st_ino)

    def lose_power(self) -> None:
        for path in self.folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.safe:
                os.truncate(path, 0)


@pytest.fixture
def at_four(three, tmp_path, monkeypatch) -> tuple[Path, list[str], TrainState]:
    """Checkpoints 2 and 3, a dead attempt, and the state at 4, not saved yet, with the digests of 3 and 4."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of saves follow
    checkpoints, digests, state = three
    shutil.rmtree(checkpoints / "step-00000001")
    (checkpoints / ".tmp-1-dead").mkdir()
    (checkpoints / ".tmp-1-dead" / "model.safetensors").write_bytes(b"half")
    advance(state, tmp_path, 1)
    return checkpoints, [digests[2], content(state)], state


def operations_of(action, folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    disk = Disk(folder)
    assert disk.run(patch, action) is None
    return disk.log


def restart(base: Path, work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    return shutil.copytree(base, work)


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_crash_at_any_file_operation_of_a_save_leaves_the_old_state_or_the_new(at_four, tmp_path, monkeypatch, done):
    base, digests, state = at_four
    work = restart(base, tmp_path / "work")
    log = operations_of(lambda: save(work, state), work, monkeypatch)
    assert log.count("rename") == 2 and log.count("fsync") == 6 and log.count("save_file") == 2
    other, found = fresh(seed=1), []
    for at in range(len(log)):
        restart(base, work)
        assert isinstance(Disk(work, at, done, Crash()).run(monkeypatch, lambda: save(work, state)), Crash)
        load(work, other, say=quiet)
        found.append(content(other))
        save(work, state)
        assert entries(work) == ["step-00000003", "step-00000004"], f"operation {at}, {log[at]}"
    publish = log.index("rename") + (not done)
    assert found == [digests[0]] * publish + [digests[1]] * (len(log) - publish)


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_crash_while_a_damaged_checkpoint_is_set_aside_loses_nothing(at_four, tmp_path, monkeypatch, done):
    base, digests, _ = at_four
    (base / "step-00000005").mkdir()
    work, other = restart(base, tmp_path / "work"), fresh(seed=1)
    log = operations_of(lambda: load(work, other, say=lambda message: None), work, monkeypatch)
    assert log.count("rename") == 1
    for at in range(len(log)):
        restart(base, work)
        other = fresh(seed=1)
        Disk(work, at, done, Crash()).run(monkeypatch, lambda: load(work, other, say=lambda message: None))  # noqa: B023
        load(work, other, say=lambda message: None)
        assert content(other) == digests[0]
        assert entries(work) == ["step-00000002", "step-00000003", "step-00000005.corrupt"]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_failing_disk_never_costs_the_last_good_checkpoint(at_four, tmp_path, monkeypatch, code, lasting):
    base, digests, state = at_four
    work = restart(base, tmp_path / "work")
    log = operations_of(lambda: save(work, state), work, monkeypatch)
    other, skipped = fresh(seed=1), 0
    for at in range(len(log)):
        restart(base, work)
        error = OSError(code, os.strerror(code))
        outcome = Disk(work, at, error=error, lasting=lasting).run(monkeypatch, lambda: save(work, state))
        published = (work / "step-00000004").exists()
        assert published or (isinstance(outcome, CheckpointSkipped) and os.strerror(code) in str(outcome))
        skipped += outcome is not None
        load(work, other, say=quiet)
        assert content(other) == digests[published]
        save(work, state)
        assert entries(work) == ["step-00000003", "step-00000004"]
    assert skipped >= log.index("rename") - log.index("save_file")
