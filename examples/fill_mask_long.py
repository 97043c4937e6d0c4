"""Guesses for a word hidden deep in a long text: `python examples/fill_mask_long.py out/ text.txt WORD`.

`out/` is a converted masked LM (`bsa-convert bert/ out/ --max-length 4096`). The last WORD within the model's length is
masked. The model reads the text before and after it, 4,096 tokens here, where the dense model would read 512. Needs the
extra `[run]`.
"""

import re
import sys

import inputs
from transformers import AutoTokenizer, pipeline

import bsa_export


def main(folder: str, file: str, word: str) -> None:
    text = " ".join(inputs.document(file).split())
    model = bsa_export.load(inputs.converted_folder(folder).path)
    if model.get_output_embeddings() is None:
        sys.exit(f"{folder}: expected a masked LM, found {type(model).__name__}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = tokenizer.model_max_length
    encoded = tokenizer(text, truncation=True, max_length=longest, return_offsets_mapping=True)
    text = text[: max(end for _, end in encoded["offset_mapping"])]
    places = list(re.finditer(rf"\b{re.escape(word)}\b", text))
    if not places:
        sys.exit(f"{word!r} is not among the first {longest} tokens of {file}")
    start, end = places[-1].span()
    before = len(tokenizer(text[:start], add_special_tokens=False, verbose=False)["input_ids"])
    print(f"{len(encoded['input_ids'])} tokens read, {before} of them before the gap")
    print(f"...{text[max(0, start - 60) : start]}[____]{text[end : end + 60]}...")

    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    hidden = text[:start] + tokenizer.mask_token + text[end:]
    for guess in fill(hidden, tokenizer_kwargs={"truncation": True, "max_length": longest}):
        mark = "  <- what stood there" if guess["token_str"].strip().lower() == word.lower() else ""
        print(f"{guess['score']:6.1%}  {guess['token_str']}{mark}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
