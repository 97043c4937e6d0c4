"""One vector for each document, and the nearest other one: `python examples/long_document_embedding.py out/ *.txt`.

`out/` is a converted sentence-transformers model (`bsa-convert all-MiniLM-L6-v2/ out/ --max-length 4096`). It reads up
to that many tokens of a document, where the dense model stops at 256 or 512. Needs the extra `[sentences]`.
"""

import sys
from pathlib import Path

import inputs
from sentence_transformers import SentenceTransformer

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)


def main(folder: str, *files: str) -> None:
    texts = [inputs.document(file) for file in files]
    model = SentenceTransformer(str(inputs.converted_folder(folder).path))
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
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
