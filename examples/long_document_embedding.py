"""Chapters as vectors, and the nearest of each: `python examples/long_document_embedding.py out/ chapters/*.txt`.

`out/` is a converted sentence-transformers model (`bsa-convert all-MiniLM-L6-v2/ out/ --max-length 4096`); a chapter
is read whole, up to that length, where the dense model would stop at 256 or 512 tokens. Needs `pip install
sentence-transformers`.
"""

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

import bsa_export  # noqa: F401  (registers the attention that model_kwargs names)


def main(folder: str, *files: str) -> None:
    model = SentenceTransformer(folder, model_kwargs={"attn_implementation": "block_sparse"})
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    vectors = model.encode(texts, batch_size=4, normalize_embeddings=True)
    similarity = vectors @ vectors.T
    for i, file in enumerate(files):
        tokens = len(model.tokenizer(texts[i], truncation=False, verbose=False)["input_ids"])
        read = min(tokens, model.max_seq_length)
        line = f"{Path(file).name}: {read} of {tokens} tokens"
        if len(files) > 1:
            similarity[i, i] = -1.0  # a chapter is not its own neighbour
            nearest = similarity[i].argmax()
            line += f"; nearest {Path(files[nearest]).name} ({similarity[i, nearest]:.3f})"
        print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
