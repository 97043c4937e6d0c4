"""Retrieval of long documents by a sentence-transformers model: truncated, in chunks, converted; and BM25.

The pooling is the mean of all tokens. Not a test. QMSum as LongEmbed has it (nDCG@10) from a file that you name: JSON
lines, gzipped or not, of {"kind": "document", "id", "text"} and {"kind": "query", "query", "document"}. The texts are
those of https://github.com/Yale-LILY/QMSum (MIT), train and validation parts, a meeting's utterances joined as
"speaker: words". Passkey is rebuilt after LongEmbed (https://arxiv.org/abs/2404.12096): 100 documents and 50 queries
for each length, one document holds the passkey of the person that is asked for; accuracy of the first hit.

    python tests/benchmarks/long_documents.py MODEL --qmsum qmsum.jsonl.gz --device cuda

MODEL is the dense model's folder; it is converted to --max-length tokens first, unless --converted names a folder.
`--layout='--mode local --num-sliding-window-blocks 9'` makes another conversion: options of bsa-convert, repeatable.
Texts are tokenized once for all methods. The time per document is the model's, with the batching around it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence

import bsa_export  # noqa: F401  (registers the attention)
from bsa_export.converted.folder import open_folder
from bsa_export.errors import BsaError

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FILLER = (
    "The river runs past the mill. A clerk counts the sacks and writes the number down. Rain is expected. "
    "The train to the coast leaves on time. Someone has painted the bench by the pond. "
)
SYLLABLES = ("ba", "den", "fi", "gor", "hal", "ki", "lo", "mar", "ne", "pol", "ri", "san", "tu", "ver", "wil", "za")

Vectors = list[Tensor]  # of each document `[chunks, hidden]`, normalised


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--converted", type=Path, help="a conversion that is there already")
    parser.add_argument("--layout", action="append", help="options of bsa-convert; by default none")
    parser.add_argument("--qmsum", type=Path, help="QMSum, or another file of that form")
    parser.add_argument("--passkey", action="store_true")
    parser.add_argument("--max-length", type=int, default=32768)
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[256, 512], help="tokens of a chunk, with [CLS], [SEP]"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--documents", type=int, help="only the first so many documents, and their queries")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of passkey documents")
    options = parser.parse_args()
    if options.converted and options.layout:
        parser.error("--layout makes conversions; it does not apply to --converted")
    if options.converted:
        try:
            open_folder(options.converted)
        except BsaError as error:
            parser.error(str(error))
    return options


class Encoder:
    """A model and what it makes of token ids. Mean pooling over all tokens, as sentence-transformers does it."""

    def __init__(self, folder: Path, device: str, batch_tokens: int):
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})
        self.tokenizer, self.device, self.batch_tokens = self.model.tokenizer, device, batch_tokens
        # RoBERTa and its relatives reserve the rows up to that of the padding.
        reserved = getattr(getattr(self.model[0].auto_model, "embeddings", None), "padding_idx", -1) + 1
        self.longest = self.model[0].auto_model.config.max_position_embeddings - reserved

    def tokenize(self, texts: list[str]) -> list[Tensor]:
        """The token ids of each text, int64 `[tokens]`, without special tokens."""
        rows = self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return [torch.tensor(row, dtype=torch.long) for row in rows]

    @torch.no_grad()
    def encode(self, texts: Sequence[Tensor], size: int | None = None) -> Vectors:
        """Normalised vectors of each text, float32 `[1, hidden]` on the CPU, in passes of up to `batch_tokens` tokens.

        With `size` (late chunking) they are `[chunks, hidden]`: each is the mean of `size` tokens.
        """
        first, last = (torch.tensor([end]) for end in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id))
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, Tensor] = {}
        while order:
            fit = max(1, self.batch_tokens // (len(texts[order[0]]) + 2))
            batch, order = order[:fit], order[fit:]
            rows = [torch.cat([first, texts[i], last]) for i in batch]
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            padding = self.tokenizer.pad_token_id
            ids = pad_sequence(rows, batch_first=True, padding_value=padding).to(self.device)  # [batch, longest]
            mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
            states = self.model[0].auto_model(ids, attention_mask=mask.long()).last_hidden_state
            vectors = chunk_means(states, mask, size or ids.shape[1]).cpu()  # [batch, chunks, hidden]
            for number, row, chunks in zip(batch, rows, vectors, strict=True):
                found[number] = chunks[: -(-len(row) // size) if size else 1]
        return [found[number] for number in range(len(texts))]


def chunk_means(states: Tensor, mask: Tensor, size: int) -> Tensor:
    """Normalised means of every `size` real tokens, float32 `[batch, chunks, hidden]`; mask `[batch, tokens]`."""
    batch, tokens, hidden = states.shape
    more = -tokens % size
    states = pad(states.masked_fill(~mask[..., None], 0), (0, 0, 0, more)).view(batch, -1, size, hidden)
    counts = pad(mask, (0, more)).view(batch, -1, size).sum(2)
    return normalize(states.sum(2, dtype=torch.float32) / counts.clamp(min=1)[..., None], dim=-1)


@dataclass(frozen=True)
class Method:
    """A way to make vectors of tokenized documents, and the model that embeds the queries for it."""

    encoder: Encoder
    vectors: Callable[[list[Tensor]], Vectors]


def truncated(encoder: Encoder, size: int) -> Method:
    return Method(encoder, lambda documents: encoder.encode([ids[: size - 2] for ids in documents]))


def chunked(encoder: Encoder, size: int, mean: bool) -> Method:
    def vectors(documents: list[Tensor]) -> Vectors:
        parts = [ids.split(size - 2) for ids in documents]
        flat = torch.cat(encoder.encode([part for one in parts for part in one])).split([len(one) for one in parts])
        return [normalize(chunks.mean(0, keepdim=True), dim=-1) if mean else chunks for chunks in flat]

    return Method(encoder, vectors)


def late(encoder: Encoder, size: int, longest: int) -> Method:
    return Method(encoder, lambda documents: encoder.encode([ids[: longest - 2] for ids in documents], size))


def bm25(documents: list[str], queries: list[str], k1: float = 1.2, b: float = 0.75) -> Tensor:
    """Scores `[queries, documents]` (Robertson and Zaragoza 2009, with Lucene's idf)."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    sizes = [sum(count.values()) for count in words]
    mean = sum(sizes) / len(sizes)
    lengths = torch.tensor(sizes, dtype=torch.float64) / mean

    @cache
    def of(word: str) -> Tensor:
        """What a word adds to the score of each document, `[documents]`."""
        tf = torch.tensor([count[word] for count in words], dtype=torch.float64)
        frequency = int((tf > 0).sum())
        idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        return idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * lengths))

    none = torch.zeros(len(documents), dtype=torch.float64)
    return torch.stack([sum(map(of, re.findall(r"\w+", query.lower())), none) for query in queries])


def similarities(documents: Vectors, queries: Tensor) -> Tensor:
    """The similarity of each query and the nearest chunk of each document, `[queries, documents]`."""
    return torch.stack([(queries @ chunks.T).amax(1) for chunks in documents], dim=1)


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """How many documents score higher than the right one, for each query; `right` int64 `[queries]`."""
    return (scores > scores.gather(1, right[:, None])).sum(1)


def ndcg_at_10(rank: Tensor) -> float:
    """nDCG@10 in percent, where one document is right for each query."""
    return float((1 / (rank + 2.0).log2()).where(rank < 10, torch.zeros(())).mean() * 100)


def mrr(rank: Tensor) -> float:
    """Mean reciprocal rank."""
    return float((1 / (rank + 1.0)).mean())


def qmsum(path: Path, most: int | None) -> tuple[list[str], list[str], Tensor]:
    """The texts, the queries about them, and the place of each query's document; ends the program without them."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        documents = {row["id"]: row["text"] for row in rows if row["kind"] == "document"}
        queries = [(row["query"], row["document"]) for row in rows if row["kind"] == "query"]
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"{path}: expected JSON lines ({error})")
    except (KeyError, TypeError) as error:
        sys.exit(f"{path}: a line lacks {error}; --help shows the form")
    if lost := {name for _, name in queries} - documents.keys():
        sys.exit(f"{path}: a query names document {min(map(str, lost))}, which is not there")
    places = {name: place for place, name in enumerate(list(documents)[:most])}
    queries = [(query, name) for query, name in queries if name in places]
    if not queries:
        sys.exit(f"{path}: expected documents and queries, found {len(places)} documents and no query about them")
    right = torch.tensor([places[name] for _, name in queries])
    return list(documents.values())[:most], [query for query, _ in queries], right


def passkey(tokens: int, seed: int = 0) -> tuple[list[str], list[str], Tensor]:
    """100 documents of about `tokens` tokens, 50 queries, and the right document of each."""
    draw = random.Random(seed * 100_000 + tokens)
    names: list[str] = []
    while len(names) < 100:
        name = " ".join("".join(draw.choices(SYLLABLES, k=2)).capitalize() for _ in range(2))
        names += [name] if name not in names else []
    sentences = FILLER.split(". ")
    documents = []
    for name in names:
        key = draw.randrange(10_000, 100_000)
        needle = f"The pass key of {name} is {key}. Remember it: {key} is the pass key of {name}"
        lines = [draw.choice(sentences).strip(" .") for _ in range(max(0, (tokens - 40) // 11))]
        lines.insert(draw.randrange(len(lines) + 1), needle)
        documents.append(". ".join(lines) + ".")
    return documents, [f"What is the pass key of {name}?" for name in names[:50]], torch.arange(50)


def main() -> None:
    options = parse()
    if options.qmsum:
        qmsum(options.qmsum, options.documents)  # before anything is converted
    dense = Encoder(options.model, options.device, options.batch_tokens)
    if not 2 < min(options.chunks) <= max(options.chunks) <= dense.longest:
        sys.exit(f"--chunks: expected 3 to {dense.longest} tokens, which is what {options.model} reads")
    converted = {}
    for layout in options.layout or [""]:
        with tempfile.TemporaryDirectory() as work:
            folder = options.converted or Path(work) / "converted"
            if options.converted is None:
                command = ["bsa-convert", options.model, folder, "--max-length", str(options.max_length)]
                subprocess.run([*command, *shlex.split(layout)], check=True)
            sparse = Encoder(folder, options.device, options.batch_tokens)
        if sparse.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
            sys.exit(f"{folder}: not a conversion of {options.model}: its vocabulary is another one")
        converted[f"converted {layout}".strip()] = sparse
    methods: dict[str, Method] = {}
    for size in options.chunks:
        methods[f"truncated at {size}"] = truncated(dense, size)
        methods[f"chunks of {size}, mean"] = chunked(dense, size, mean=True)
        methods[f"chunks of {size}, best"] = chunked(dense, size, mean=False)
    for name, sparse in converted.items():
        longest = min(options.max_length, sparse.longest)
        methods[f"{name}, one vector"] = truncated(sparse, longest)
        for size in options.chunks:
            methods[f"{name}, late chunks of {size}"] = late(sparse, size, longest)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; the converted model reads {longest:,} tokens", flush=True)
    if options.qmsum:
        compare_short(options, dense, converted)
        run_qmsum(options, methods)
    if options.passkey:
        run_passkey(options, methods)


def compare_short(options: argparse.Namespace, dense: Encoder, converted: dict[str, Encoder]) -> None:
    """Prints how alike the vectors of texts are that the dense model can read."""
    documents = dense.tokenize(qmsum(options.qmsum, options.documents)[0])
    own = torch.cat(truncated(dense, dense.longest).vectors(documents))
    print(f"\nmean cosine with the dense model's vector, of the first {dense.longest} tokens")
    for name, sparse in converted.items():
        other = torch.cat(truncated(sparse, dense.longest).vectors(documents))
        print(f"  {name}: {float((own * other).sum(1).mean()):.4f}", flush=True)


def tokenized(encoder: Encoder, texts: list[str]) -> tuple[list[Tensor], float]:
    """The texts' tokens, once for all methods, and the seconds that it took."""
    started = time.perf_counter()
    return encoder.tokenize(texts), time.perf_counter() - started


def asked(methods: dict[str, Method], queries: list[str]) -> dict[Encoder, Tensor]:
    """Each model's vectors of the queries, `[queries, size]`."""
    found = {}
    for encoder in {method.encoder for method in methods.values()}:
        texts = encoder.tokenize(queries)
        found[encoder] = torch.cat(truncated(encoder, min(512, encoder.longest)).vectors(texts))
    return found


def run_qmsum(options: argparse.Namespace, methods: dict[str, Method]) -> None:
    texts, queries, right = qmsum(options.qmsum, options.documents)
    documents, seconds = tokenized(next(iter(methods.values())).encoder, texts)
    questions = asked(methods, queries)
    tokens = sum(map(len, documents)) / len(texts)
    print(f"\n{options.qmsum.name}: {len(texts)} documents of {tokens:,.0f} tokens, {len(queries)} queries")
    print(f"tokenization, once for all methods: {1000 * seconds / len(texts):.1f} ms per document\n")
    print("| | nDCG@10 | MRR | ms per document | peak memory, MiB |\n|---|---|---|---|---|")
    for name, method in methods.items():
        method.vectors(documents[:2])  # what is compiled or cached at a first call
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        found = method.vectors(documents)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 1024 * usage()
        rank = ranks(similarities(found, questions[method.encoder]), right)
        figures = f"{ndcg_at_10(rank):.1f} | {mrr(rank):.3f} | {1000 * seconds / len(texts):.1f}"
        print(f"| {name} | {figures} | {peak / 2**20:,.0f} |", flush=True)
    started = time.perf_counter()
    rank = ranks(bm25(texts, queries), right)
    seconds = time.perf_counter() - started
    print(f"| BM25 | {ndcg_at_10(rank):.1f} | {mrr(rank):.3f} | {1000 * seconds / len(texts):.1f} | |", flush=True)


def run_passkey(options: argparse.Namespace, methods: dict[str, Method]) -> None:
    columns: dict[str, list[float]] = {name: [] for name in (*methods, "BM25")}
    spent, count = 0.0, 0
    for length in options.lengths:
        texts, queries, right = (part[: options.documents] for part in passkey(length))
        documents, seconds = tokenized(next(iter(methods.values())).encoder, texts)
        spent, count = spent + seconds, count + len(texts)
        questions = asked(methods, queries)
        for name, method in methods.items():
            rank = ranks(similarities(method.vectors(documents), questions[method.encoder]), right)
            columns[name].append(100 * float((rank == 0).float().mean()))
        columns["BM25"].append(100 * float((ranks(bm25(texts, queries), right) == 0).float().mean()))
    print("\nPasskey: accuracy in percent, by tokens of a document")
    print(f"tokenization, once for all methods: {1000 * spent / count:.1f} ms per document\n")
    print(f"| | {' | '.join(f'{length:,}' for length in options.lengths)} | mean |")
    print("|---|" + "---|" * (len(options.lengths) + 1))
    for name, hits in columns.items():
        print(f"| {name} | {' | '.join(f'{hit:.0f}' for hit in hits)} | {sum(hits) / len(hits):.1f} |", flush=True)


def usage() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
