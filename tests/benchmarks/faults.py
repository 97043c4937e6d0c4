"""Faults that bsa-verify must find: seeded ones planted into real converted checkpoints, and clean conversions that it
must pass.

Not a test: `python tests/benchmarks/faults.py MODEL ...`, where each MODEL is a folder with a BERT checkpoint, such as
those that tests/material.sh fetches. Each model is converted in several ways; the faults are shared out evenly over
conversions and kinds. Each is planted into the files themselves, judged three times, and undone:

- with the source, and without any recorded digest: the file, layout and weights checks;
- without the source: the file and layout checks, which compare the digests that conversion.json records;
- without either: the file and layout checks alone. What they cannot see is bits of weights that are valid as they are.

The same checks must pass before the first fault and after the last. `--clean N` instead verifies N clean conversions
of small random models, over families, modes, lengths, dtypes and formats, by everything that runs on this machine in
this process.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "verify"), str(Path(__file__).resolve().parents[1])]

from planted import KINDS, planted, without_digests  # noqa: E402

from bsa_export.conversion.convert import Source, convert_source  # noqa: E402
from bsa_export.conversion.plan import Options  # noqa: E402
from bsa_export.converted.folder import open_folder  # noqa: E402
from bsa_export.verify import check_file, check_layout  # noqa: E402
from bsa_export.verify.weights import check_weights  # noqa: E402

CONVERSIONS = {
    "windowed, 8 x as long": ({"max_length": 4096}, None),
    "bigbird, a layout a layer, bf16, interpolated": (
        {
            "max_length": 2048, "mode": "bigbird", "seed": 3, "different_layout_per_layer": True, "dtype": "bf16",
            "positions": "interpolate",
        },
        None,
    ),
    "fixed, block 16, shards of 20 MB": ({"max_length": 1024, "mode": "fixed", "block": 16}, 20_000_000),
}  # fmt: skip
WAYS = ("with the source", "by digests alone", "by neither")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", type=int, metavar="N", help="verify N clean conversions instead")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(argv)
    if not options.models and not options.clean:
        parser.error("a MODEL or --clean is needed")
    return options


def judge(way: str, folder: Path, bare: Path, source: Path) -> str | None:
    """The first check that fails, by name; None if none does."""
    target = folder if way == "by digests alone" else bare
    for check in (check_file(target), check_layout(target)):
        if check.failed:
            return check.name
    if way == "with the source" and check_weights(open_folder(target), source).failed:
        return "weights"
    return None


def run_faults(options: argparse.Namespace, work: Path) -> int:
    subjects = []
    for model in options.models:
        for name, (chosen, shard) in CONVERSIONS.items():
            folder = work / f"{model.name}-{len(subjects)}"
            convert_source(Source(model), folder, Options(**chosen), max_shard_size=shard)
            bare = shutil.copytree(folder, folder.with_name(f"{folder.name}-bare"))
            without_digests(bare)
            subjects.append((f"{model.name}, {name}", folder, bare, model))
    print(f"{len(subjects)} conversions: {'; '.join(subject[0] for subject in subjects)}", flush=True)
    clean(options, subjects)
    planted_of, found, by, missed = Counter(), Counter(), Counter(), {}
    started, kinds = time.perf_counter(), list(KINDS)
    for number in range(options.faults):
        kind = kinds[number % len(kinds)]
        name, folder, bare, source = subjects[number // len(kinds) % len(subjects)]
        seed = options.seed * 1_000_000 + number
        planted_of[kind] += 1
        with planted(kind, folder, seed) as what, planted(kind, bare, seed):
            for way in options.ways:
                check = judge(way, folder, bare, source)
                found[kind, way] += check is not None
                by[way, check] += 1
                if check is None:
                    missed.setdefault(way, []).append(f"{name}: {kind}: {what}")
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{options.faults}", end="", file=sys.stderr)
    clean(options, subjects)
    print(f"\n{options.faults} faults, seed {options.seed}, {time.perf_counter() - started:.0f} s; found:")
    print("| fault | planted | " + " | ".join(options.ways) + " |")
    print("|---|---|" + "---|" * len(options.ways))
    for kind in kinds:
        print(f"| {kind} | {planted_of[kind]} | " + " | ".join(str(found[kind, way]) for way in options.ways) + " |")
    totals = [sum(found[kind, way] for kind in kinds) for way in options.ways]
    print(f"| all | {options.faults} | " + " | ".join(map(str, totals)) + " |")
    for way in options.ways:
        print(
            f"{way}: "
            + ", ".join(f"{count} by {check or 'nothing'}" for (one, check), count in by.items() if one == way)
        )
    for way in WAYS[:2]:
        for line in missed.get(way, []):
            print(f"MISSED {way}: {line}")
    return int(any(missed.get(way) for way in WAYS[:2]))


def clean(options: argparse.Namespace, subjects: list) -> None:
    for name, folder, bare, source in subjects:
        for way in options.ways:
            check = judge(way, folder, bare, source)
            if check is not None:
                raise SystemExit(f"{name}: without any fault, {check} fails ({way})")


def run_clean(options: argparse.Namespace, work: Path) -> int:
    from converted_models import clean_cases, make
    from transformers.utils import logging

    from bsa_export.verify.run import Wanted
    from bsa_export.verify.run import run_checks as verify

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    verdicts, worst, started = Counter(), 0.0, time.perf_counter()
    for number, case in enumerate(clean_cases(options.clean, options.seed)):
        with contextlib.redirect_stderr(None):
            source, folder = make(case, work / str(number))
        run = verify(Wanted(folder, source, backends=("torch",)))
        verdicts[run.verdict] += 1
        worst = max(worst, *(check.figures.get("error", 0.0) for check in run.checks))
        for check in run.checks:
            if check.status in ("failed", "skipped"):
                print(f"{case}: {check.name} {check.status}: {check.reason}", flush=True)
        shutil.rmtree(work / str(number))
    seconds = time.perf_counter() - started
    print(
        f"{options.clean} clean conversions, seed {options.seed}: "
        + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        + f"; the largest error is {worst:.2f} x plain PyTorch's, limit 2; {seconds:.0f} s"
    )
    return int(set(verdicts) != {"passed"})


def main(argv=None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as work:
        return run_clean(options, Path(work)) if options.clean else run_faults(options, Path(work))


if __name__ == "__main__":
    sys.exit(main())
