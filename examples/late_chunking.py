"""Search inside a long document: `python examples/late_chunking.py out/ document.txt "What is asked?"`.

`out/` is a converted sentence-transformers model (`bsa-convert all-MiniLM-L6-v2/ out/ --max-length 32768`). The
document is read in one pass. Then the token vectors of each chunk are averaged, so each chunk's vector depends on the
text around it (late chunking, https://arxiv.org/abs/2409.04701). Needs the extra `[sentences]`.
"""

import argparse

import inputs
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

import bsa_export  # noqa: F401  (registers the attention that the model's config.json names)


def chunk_vectors(model: SentenceTransformer, text: str, size: int) -> tuple[torch.Tensor, list[str]]:
    """Normalised vectors `[chunks, hidden]` of a document, and the text of each chunk of `size` tokens."""
    states = model.encode(text, output_value="token_embeddings", convert_to_tensor=True).float()  # [tokens, hidden]
    settings = {"truncation": True, "max_length": model.max_seq_length, "return_offsets_mapping": True}
    offsets = model.tokenizer(text, **settings)["offset_mapping"]
    vectors = normalize(torch.stack([chunk.mean(0) for chunk in states.split(size)]), dim=-1)
    spans = [[end for end in part if end[1]] for part in (offsets[i : i + size] for i in range(0, len(states), size))]
    return vectors, [text[span[0][0] : span[-1][1]] if span else "" for span in spans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("document")
    parser.add_argument("question")
    parser.add_argument("--size", type=int, default=256, help="tokens of a chunk")
    parser.add_argument("--show", type=int, default=3, help="chunks to show")
    options = parser.parse_args()
    if min(options.size, options.show) < 1:
        parser.error("--size and --show: expected at least 1")

    text = inputs.document(options.document)
    model = SentenceTransformer(str(inputs.converted_folder(options.model).path))
    vectors, chunks = chunk_vectors(model, text, options.size)
    question = model.encode(options.question, convert_to_tensor=True, normalize_embeddings=True).float()
    scores = vectors @ question
    tokens = len(model.tokenizer(text, truncation=False, verbose=False)["input_ids"])
    read = min(tokens, model.max_seq_length)
    print(f"{len(chunks)} chunks of {options.size} tokens, {read} of {tokens} tokens read in one pass")
    for place in scores.topk(min(options.show, len(chunks))).indices.tolist():
        excerpt = " ".join(chunks[place].split())[:160]
        print(f"{scores[place]:.3f}  chunk {place + 1}: {excerpt}")


if __name__ == "__main__":
    main()
