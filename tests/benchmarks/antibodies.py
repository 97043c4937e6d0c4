"""A folder with AntiBERTy and antibodies, for tests/benchmarks/quality.py.

Not a test: `python tests/benchmarks/antibodies.py .cache/antiberty FOLDER`, with the PyPI package `anarci` installed.
Each sequence is a human heavy chain: a germline V gene joined to a J gene, of about 110 residues. The genes come from
that package (BSD-3), and the folder is for your own use.
"""

import json
import random
import shutil
import sys
from pathlib import Path

from anarci.germlines import all_germlines
from tokenizers import Tokenizer, models, pre_tokenizers

# The vocabulary of AntiBERTy's package, in its order.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
COUNT = 200


def main(model: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(Path(model, name), folder)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(VOCABULARY[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = random.Random(0)
    v_genes, j_genes = (sorted(all_germlines[kind]["H"]["human"].items()) for kind in "VJ")
    with open(folder / "heldout.jsonl", "w", encoding="utf-8") as file:
        for name, start in draw.sample(v_genes, COUNT):
            other, end = draw.choice(j_genes)
            text = (start.rstrip("-") + end.lstrip("-")).replace("-", "")
            print(json.dumps({"name": f"{name} {other}", "text": text}), file=file)


if __name__ == "__main__":
    main(*sys.argv[1:])
