"""Retrieval of long documents by a sentence-transformers model: truncated, in chunks, converted; and BM25.

The pooling is the mean of all tokens. Not a test. QMSum as LongEmbed has it (nDCG@10) from a file that you name: JSON
lines, gzipped or not, of {"kind": "document", "id", "text"} and {"kind": "query", "query", "document"}. The texts are
those of https://github.com/Yale-LILY/QMSum (MIT), train and validation parts, a meeting's utterances joined as
"speaker: words". Passkey is rebuilt after LongEmbed (https://arxiv.org/abs/2404.12096): 100 documents and 50 queries
for each length, one document holds the passkey of the person that is asked for; accuracy of the first hit.

    python tests/benchmarks/long_documents.py MODEL --qmsum qmsum.jsonl.gz --device cuda

MODEL is the dense model's folder; it is converted to --max-length tokens first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import resource
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

import bsa_export  # noqa: F401  (registers the attention)

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FILLER = (
    "The river runs past the mill. A clerk counts the sacks and writes the number down. Rain is expected. "
    "The train to the coast leaves on time. Someone has painted the bench by the pond. "
)
SYLLABLES = ("ba", "den", "fi", "gor", "hal", "ki", "lo", "mar", "ne", "pol", "ri", "san", "tu", "ver", "wil", "za")

Vectors = list[Tensor]  # of each document `[chunks, size]`, normalised


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--converted", type=Path, help="a conversion that is there already")
    parser.add_argument("--qmsum", type=Path)
    parser.add_argument("--passkey", action="store_true")
    parser.add_argument("--max-length", type=int, default=32768)
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[256, 512], help="tokens of a chunk, with [CLS], [SEP]"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--documents", type=int, help="only the first so many documents, and their queries")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of passkey documents")
    return parser.parse_args()


class Encoder:
    """A model and what it makes of token ids. Mean pooling over all tokens, as sentence-transformers does it."""

    def __init__(self, folder: Path, device: str, batch_tokens: int):
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})
        self.tokenizer, self.device, self.batch_tokens = self.model.tokenizer, device, batch_tokens
        self.longest = self.model[0].auto_model.config.max_position_embeddings

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    @torch.no_grad()
    def hidden(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """The last hidden states of each sequence, float32 `[tokens, size]` with its special tokens."""
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        found: dict[int, Tensor] = {}
        while order:
            longest = len(sequences[order[0]]) + 2
            batch, order = order[: max(1, self.batch_tokens // longest)], order[max(1, self.batch_tokens // longest) :]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(batch):
                tokens = [first, *sequences[number], last]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            states = (
                self.model[0].auto_model(ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
            )
            for row, number in enumerate(batch):
                found[number] = states[row, : len(sequences[number]) + 2].float()
        return [found[number] for number in range(len(sequences))]

    def pooled(self, sequences: Sequence[list[int]]) -> Tensor:
        """Normalised vectors `[sequences, size]`, on the CPU."""
        groups = [sequences[start : start + 512] for start in range(0, len(sequences), 512)]
        pooled = [torch.stack([states.mean(0) for states in self.hidden(group)]) for group in groups]
        return normalize(torch.cat(pooled), dim=-1).cpu()


def pieces(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, max(len(ids), 1), size)]


def truncated(encoder: Encoder, size: int) -> Callable[[list[str]], Vectors]:
    return lambda texts: list(encoder.pooled([encoder.ids(text)[: size - 2] for text in texts])[:, None])


def chunked(encoder: Encoder, size: int, mean: bool) -> Callable[[list[str]], Vectors]:
    def vectors(texts: list[str]) -> Vectors:
        parts = [pieces(encoder.ids(text), size - 2) for text in texts]
        flat = encoder.pooled([part for one in parts for part in one]).split([len(one) for one in parts])
        return [normalize(chunks.mean(0, keepdim=True), dim=-1) if mean else chunks for chunks in flat]

    return vectors


def late(encoder: Encoder, size: int, longest: int) -> Callable[[list[str]], Vectors]:
    """One pass over a document; its tokens are pooled chunk by chunk afterwards."""

    def vectors(texts: list[str]) -> Vectors:
        found = []
        for text in texts:
            states = encoder.hidden([encoder.ids(text)[: longest - 2]])[0]
            found.append(normalize(torch.stack([part.mean(0) for part in states.split(size)]), dim=-1).cpu())
        return found

    return vectors


def bm25(documents: list[str], queries: list[str], k1: float = 1.2, b: float = 0.75) -> Tensor:
    """Scores `[queries, documents]` (Robertson and Zaragoza 2009, with Lucene's idf)."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    sizes = [sum(count.values()) for count in words]
    mean = sum(sizes) / len(sizes)
    frequency = Counter(word for count in words for word in count)
    scores = torch.zeros(len(queries), len(documents))
    for q, query in enumerate(queries):
        for word in re.findall(r"\w+", query.lower()):
            idf = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            for d, count in enumerate(words):
                if tf := count[word]:
                    scores[q, d] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * sizes[d] / mean))
    return scores


def similarities(documents: Vectors, queries: Tensor) -> Tensor:
    """The similarity of each query and the nearest chunk of each document, `[queries, documents]`."""
    return torch.stack([(queries @ chunks.T).amax(1) for chunks in documents], dim=1)


def ndcg_at_10(scores: Tensor, right: Tensor) -> float:
    """nDCG@10 in percent, where one document is right for each query; `right` int64 `[queries]`."""
    rank = (scores > scores.gather(1, right[:, None])).sum(1)
    return float((1 / (rank + 2.0).log2()).where(rank < 10, torch.zeros(())).mean() * 100)


def qmsum(path: Path, most: int | None) -> tuple[list[str], list[str], Tensor]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    documents = {row["id"]: row["text"] for row in rows if row["kind"] == "document"}
    places = {name: place for place, name in enumerate(list(documents)[:most])}
    queries = [row for row in rows if row["kind"] == "query" and row["document"] in places]
    right = torch.tensor([places[row["document"]] for row in queries])
    return list(documents.values())[:most], [row["query"] for row in queries], right


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
    with tempfile.TemporaryDirectory() as work:
        folder = options.converted or Path(work) / "converted"
        if options.converted is None:
            subprocess.run(["bsa-convert", options.model, folder, "--max-length", str(options.max_length)], check=True)
        dense = Encoder(options.model, options.device, options.batch_tokens)
        sparse = Encoder(folder, options.device, options.batch_tokens)
        methods: dict[str, Callable[[list[str]], Vectors]] = {}
        for size in options.chunks:
            methods[f"truncated at {size}"] = truncated(dense, size)
            methods[f"chunks of {size}, mean"] = chunked(dense, size, mean=True)
            methods[f"chunks of {size}, best"] = chunked(dense, size, mean=False)
        methods["converted, one vector"] = truncated(sparse, options.max_length)
        for size in options.chunks:
            methods[f"converted, late chunks of {size}"] = late(sparse, size, options.max_length)
        where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{where}, torch {torch.__version__}", flush=True)
        if options.qmsum:
            run_qmsum(options, dense, methods)
        if options.passkey:
            run_passkey(options, dense, methods)


def run_qmsum(options: argparse.Namespace, dense: Encoder, methods: dict[str, Callable[[list[str]], Vectors]]) -> None:
    documents, queries, right = qmsum(options.qmsum, options.documents)
    print(f"\nQMSum: {len(documents)} documents, {len(queries)} queries\n")
    print("| | nDCG@10 | ms a document | peak memory, MiB |\n|---|---|---|---|")
    asked = dense.pooled([dense.ids(query)[: dense.longest - 2] for query in queries])
    for name, vectors in methods.items():
        vectors(documents[:2])  # what is compiled or cached at a first call
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        found = vectors(documents)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 1024 * usage()
        score = ndcg_at_10(similarities(found, asked), right)
        print(f"| {name} | {score:.1f} | {1000 * seconds / len(documents):.1f} | {peak / 2**20:,.0f} |", flush=True)
    started = time.perf_counter()
    score = ndcg_at_10(bm25(documents, queries), right)
    print(f"| BM25 | {score:.1f} | {1000 * (time.perf_counter() - started) / len(documents):.1f} | |", flush=True)


def run_passkey(
    options: argparse.Namespace, dense: Encoder, methods: dict[str, Callable[[list[str]], Vectors]]
) -> None:
    print("\nPasskey: accuracy in percent, by tokens of a document\n")
    print(f"| | {' | '.join(f'{length:,}' for length in options.lengths)} | mean |")
    print("|---|" + "---|" * (len(options.lengths) + 1))
    tasks = [passkey(length) for length in options.lengths]
    for name, vectors in [*methods.items(), ("BM25", None)]:
        hits = []
        for documents, queries, right in tasks:
            if vectors is None:
                scores = bm25(documents, queries)
            else:
                scores = similarities(vectors(documents), dense.pooled([dense.ids(query) for query in queries]))
            hits.append(100 * float((scores.argmax(1) == right).float().mean()))
        print(f"| {name} | {' | '.join(f'{hit:.0f}' for hit in hits)} | {sum(hits) / len(hits):.1f} |", flush=True)


def usage() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
