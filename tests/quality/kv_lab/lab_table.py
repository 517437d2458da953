# SPDX-License-Identifier: Apache-2.0
"""docs/results/variants.json: one row for each variant that was tried."""
import fcntl
import json

from .lab_model import ROOT

RESULTS = ROOT / "docs" / "results" / "variants.json"


def without_keep(argv):
    """The arguments that matter to the numbers."""
    skipped, kept = False, []
    for argument in argv:
        if skipped or argument in ("--keep", "--tables", "--save", "--device", "--threads"):
            skipped = not skipped
            continue
        kept.append(argument)
    return kept


def line(row):
    return (f"{row['model']:12} n {row['context']} bits {row['bits']:.3f} KL {row['kl_mean']:.5f} "
            f"± {row['kl_ci95']:.5f} median {row['kl_median']:.5f} p999 {row['kl_p999']:.4f} top1 {row['top1']:.4f} "
            f"ratio {row['ratio']:.3f} ± {row['ratio_ci95']:.3f} typical {row['typical']:.3f} "
            f"± {row['typical_ci95']:.3f}   {row['command']}")


def read():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def keep(row):
    """Adds a row, in place of an older one of the same command."""
    with open(RESULTS, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = [old for old in json.load(file) if old.get("command") != row["command"]] + [row]
        lines = ",\n".join(json.dumps(old, ensure_ascii=False) for old in rows)
        file.seek(0)
        file.write(f"[\n{lines}\n]\n")
        file.truncate()
