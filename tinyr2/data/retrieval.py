"""Passages of the user's corpus that speak of a query: BM25, and hidden states beside it where a model is given.

In: a text file of paragraphs, or .jsonl or .parquet with a column `text`; later, queries. Out: the best passages, each
with its score, in an order that depends on corpus and query alone. A DataError names the file, the line and the cure.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyr2.core.config import nearest
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.data.rows import open_rows

K1, B = 1.5, 0.75  # of BM25: how soon a repeated word stops counting, how much a long passage pays for its length
BATCH = 32  # texts that are embedded side by side
Embed = Callable[[Sequence[str]], np.ndarray]  # n texts -> (n, D), any length

# A word is a run of letters, digits and marks; in scripts that are written without spaces each character is one.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


@dataclass(frozen=True)
class Passage:
    """A piece of the corpus that was found."""

    text: str
    score: float  # BM25's, or the weighted one; more is better
    id: str  # the row's own, or <file stem>:<number>, counted from 0


@dataclass(frozen=True)
class Corpus:
    """The passages, in the file's order."""

    texts: tuple[str, ...]
    ids: tuple[str, ...]

    @classmethod
    def read(cls, path: str) -> "Corpus":
        """Paragraphs of a .txt file (empty lines lie between them), or the column `text` of a .jsonl or .parquet file.

        A column `id` names the passages. DataError: no such file, another kind of file, a row without text, no passage.
        """
        file = Path(path).expanduser()
        found = _paragraphs(file) if file.suffix == ".txt" else _column(file)
        if not found:
            raise DataError(f"{file}: the corpus is empty; it needs at least one passage")
        return cls(texts=tuple(text for _, text in found), ids=tuple(name for name, _ in found))

    @property
    def fingerprint(self) -> str:
        """16 hex digits over ids and texts, in their order."""
        digest = blake2b(digest_size=8)
        for part in (*self.ids, *self.texts):
            digest.update(f"{len(part)}:{part}".encode())
        return digest.hexdigest()


class Retriever:
    """An index of a corpus. Making it costs a pass over the corpus; a query, its words."""

    def __init__(self, corpus: Corpus, *, embed: Embed | None = None, dense_weight: float = 0.5):
        """embed: for hybrid retrieval; each passage is embedded once, here    dense_weight: 0 … 1, of the cosine

        ConfigError where bm25s is not installed; DataError for a corpus without any word.
        """
        self._corpus, self._embed, self._dense_weight = corpus, embed, dense_weight
        split = [words(text) for text in corpus.texts]
        if not any(split):
            raise DataError("the corpus has no word to be found by; give passages with letters or digits")
        self._words = set().union(*split)
        # Lucene's variant, whose idf is never negative; in float64, so that equal passages have equal scores
        self._index = _bm25s().BM25(k1=K1, b=B, method="lucene", dtype="float64")
        self._index.index(split, show_progress=False)
        self._dense = None if embed is None else _unit(embed(corpus.texts))

    def top(self, query: str, k: int) -> list[Passage]:
        """The k passages that fit best, best first; equal ones in the corpus's order.

        A passage is left out that shares no word with the query, or, in hybrid retrieval, whose score is not above 0.
        """
        scores = self._scores(query)
        order = np.argsort(-scores, kind="stable")[:k]
        return [Passage(self._corpus.texts[i], float(scores[i]), self._corpus.ids[i]) for i in order if scores[i] > 0]

    def texts(self, query: str, k: int) -> list[str]:
        """The texts of `top`."""
        return [passage.text for passage in self.top(query, k)]

    def _scores(self, query: str) -> np.ndarray:
        """(passages,) float64. Σ over the query's words of idf(w) · f / (f + k1 (1 − b + b · length / mean length)).

        f: how often the passage has w; idf(w) = log(1 + (N − n + 0.5) / (n + 0.5)), where n of N passages have w. The
        hybrid score is the weighted mean of the cosine and of BM25 over its maximum for this query.
        """
        asked = [w for w in words(query) if w in self._words]
        lexical = self._index.get_scores(asked) if asked else np.zeros(len(self._corpus.texts))
        if self._embed is None or self._dense is None:
            return lexical
        cosine = self._dense @ _unit(self._embed([query]))[0]
        best = lexical.max()
        return self._dense_weight * cosine + (1 - self._dense_weight) * (lexical / best if best > 0 else lexical)


def words(text: str) -> list[str]:
    """What BM25 counts: words without regard to case; a Chinese or Japanese character is a word by itself."""
    return _WORD.findall(text.casefold())


def mean_pooled(path: str, device: torch.device) -> Embed:
    """Embeddings by the transformers model in `path`: the mean of its last hidden states over a text's tokens."""
    from transformers import AutoModel, AutoTokenizer  # a second, which runs without retrieval do without

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: no model to embed with: {reason}; give a folder or a hub name with a tokenizer, or "
                        "leave the embedder out") from error
    model = model.to(device).eval()
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        out = [_pooled(model, [ids[:limit] for ids in tokenizer(list(texts[i:i + BATCH]))["input_ids"]], device)
               for i in range(0, len(texts), BATCH)]
        return torch.cat(out).double().cpu().numpy()

    return embed


def _pooled(model: torch.nn.Module, rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """(n, D): padded on the right, where no earlier token of a causal model looks; the mean leaves the padding out."""
    width = max(1, *map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors, dtype=np.float64) / np.where(norms == 0, 1.0, norms)


def _paragraphs(file: Path) -> list[tuple[str, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        hint = nearest(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else None
        cure = f"did you mean {hint}? " if hint else ""
        raise DataError(f"{file}: the corpus cannot be read: {error.strerror}; {cure}looked in "
                        f"{file.absolute().parent}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    parts = [part.strip() for part in re.split(r"\n\s*\n", text)]
    return [(f"{file.stem}:{i}", part) for i, part in enumerate(filter(None, parts))]


def _column(file: Path) -> list[tuple[str, str]]:
    if file.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{file}: a corpus is a .txt file of paragraphs, or .jsonl or .parquet with a column text; "
                        "convert it to one of them")
    stem, rows = open_rows(str(file), None, "train")
    found = []
    for i, (where, row) in enumerate(rows):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: no text in the column text, got {text!r:.60}; the row has "
                            f"{', '.join(map(repr, row)) or 'no columns'}; fill it in or remove the row")
        found.append((str(row.get("id", f"{stem}:{i}")), text.strip()))
    return found


def _bm25s() -> Any:
    try:
        import bm25s  # only runs that retrieve need it
    except ImportError as error:
        raise ConfigError("a corpus is searched with the package bm25s, which is not installed; "
                          "pip install tinyr2[retrieval]") from error
    return bm25s
