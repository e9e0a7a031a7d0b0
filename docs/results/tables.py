"""Makes the tables of README.md and docs/*.md from the records beside this file.

    python docs/results/tables.py                                   updates the tables of all pages
    python docs/results/tables.py out/pepl/mine/seed*/result.json   prints a table of your runs

A table stands between markers that give its records, relative to the repository, and optionally
another key of them than "rows":

    <!-- table docs/results/caudo_diff_isic2018_*.json key=pseudo_labels --> ... <!-- end -->
    <!-- compare dice rows=unet,diffseg_crf A=docs/results/a.json B=docs/results/b.json --> ...
                                                one metric of some rows; records as named lines
    <!-- summary --> ... <!-- end -->                           README's table, from SUMMARY
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "unet": "U-Net, all masks",
    "tags_unet": "U-Net on tags",
    "tags_unet_crf": "U-Net on tags + CRF",
    "tags_student": "student of U-Net on tags",
    "difference": "difference alone",
    "blend": "blend alone",
    "diffseg": "DiffSeg",
    "diffseg_crf": "DiffSeg + CRF",
    "diffseg_student": "student of DiffSeg",
    "diffseg_student_crf": "student of DiffSeg + CRF",
    "fixmatch": "FixMatch",
    "freematch": "FreeMatch",
    "pepl": "PEPL",
    "cutmix": "FreeMatch + CutMix",
    "freematch_propagation": "FreeMatch + label propagation",
    "pepl_propagation": "PEPL + label propagation",
    "exemplar_only": "exemplar only",
    "self_training": "self-training",
    "caudo_diff": "Caudo-Diff",
    "prior_only": "image prior only",
    "caudo_diff_prior": "Caudo-Diff + image prior",
    "caudo_diff_crf": "Caudo-Diff + image prior + CRF",
    "full_supervision": "full supervision",
    "dice": "Dice",
    "dice_prior": "Dice with image prior",
    "iou": "IoU",
    "ged": "GED",
}

# README's table, a row a method: for each column its cells (records, row of their tables, metric,
# name).
COLUMNS = ["the paper's method", "with our additions", "controls", "ceiling"]
ISIC, EXEMPLARS = "diffseg_isic2018_seed*", "caudo_diff_isic2018_*"
BIRDS = "pepl_cub100_seed*"
SUMMARY = {
    "DiffSeg": (
        [(ISIC, "diffseg_crf", "dice", "with CRF")],
        [(ISIC, "diffseg_student", "dice", "student")],
        [
            (ISIC, "tags_unet_crf", "dice", "U-Net with CRF"),
            (ISIC, "tags_student", "dice", "its student"),
        ],
        [(ISIC, "unet", "dice", "all masks")],
    ),
    "PEPL": (
        [(BIRDS, "pepl", "accuracy", "maps")],
        [(BIRDS, "pepl_propagation", "accuracy", "propagation")],
        [
            (BIRDS, "freematch", "accuracy", "FreeMatch"),
            (BIRDS, "freematch_propagation", "accuracy", "propagation"),
            (BIRDS, "cutmix", "accuracy", "CutMix"),
        ],
        [("pepl_cub100_all_labels_seed0", "supervised", "accuracy", "seed 0")],
    ),
    "Caudo-Diff": (
        [(EXEMPLARS, "caudo_diff", "dice", "diffusion")],
        [(EXEMPLARS, "caudo_diff_prior", "dice_prior", "with prior")],
        [
            (EXEMPLARS, "self_training", "dice", "self-training"),
            (EXEMPLARS, "self_training", "dice_prior", "with prior"),
            (EXEMPLARS, "prior_only", "dice_prior", "prior alone"),
        ],
        [(EXEMPLARS, "full_supervision", "dice_prior", "all masks, with prior")],
    ),
}


def summary():
    """README's table: means over the records of each method."""
    lines = [" | ".join(["| method", *COLUMNS]) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for method, columns in SUMMARY.items():
        cells = [", ".join(cell(x) for x in column) for column in columns]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def cell(entry):
    """The mean of a metric over the records of an entry, with its name."""
    files, row, metric, name = entry
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in ROOT.glob(f"docs/results/{files}.json")
    ]
    mean = statistics.mean(record["rows"][row][metric] for record in records)
    return f"{mean:.3f} ({name})"


def table(files, key="rows"):
    """A markdown table, a row a method: means over records, the first metric with its deviation."""
    records = [json.loads(Path(file).read_text(encoding="utf-8"))[key] for file in files]
    metrics = list(next(iter(records[0].values())))
    heads = [NAMES.get(m, m.replace("_", " ")) for m in metrics]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for row in records[0]:
        values = [[record[row][m] for record in records] for m in metrics]
        cells = [f"{statistics.mean(v):.3f}" for v in values]
        if len(records) > 1:
            cells[0] += f" ± {statistics.pstdev(values[0]):.3f}"
        lines.append(f"| {NAMES.get(row, row.replace('_', ' '))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(metric, rows, records):
    """A markdown table of one metric, a line a record {name: path}, a column a row of its table."""
    rows = rows.split(",")
    lines = [" | ".join(["| ", *(NAMES[row] for row in rows)]) + " |"]
    lines.append("| --- " * (len(rows) + 1) + "|")
    for name, path in records.items():
        values = json.loads((ROOT / path).read_text(encoding="utf-8"))["rows"]
        cells = [f"{values[row][metric]:.3f}" if row in values else "—" for row in rows]
        lines.append(" | ".join([f"| {name.replace('_', ' ')}", *cells]) + " |")
    return "\n".join(lines)


def fill(text):
    """The text of a page with the tables between its markers made anew."""

    def from_records(match):
        files = sorted(ROOT.glob(match[1]))
        made = table(files, match[2] or "rows")
        return f"{match[0].splitlines()[0]}\n{made}\n<!-- end -->"

    pattern = r"<!-- table (\S+)(?: key=(\S+))? -->\n.*?<!-- end -->"
    text = re.sub(pattern, from_records, text, flags=re.DOTALL)

    def from_names(match):
        records = dict(item.split("=") for item in match[3].split())
        made = compare(match[1], match[2], records)
        return f"{match[0].splitlines()[0]}\n{made}\n<!-- end -->"

    pattern = r"<!-- compare (\S+) rows=(\S+) (.+?) -->\n.*?<!-- end -->"
    text = re.sub(pattern, from_names, text, flags=re.DOTALL)
    made = f"<!-- summary -->\n{summary()}\n<!-- end -->" if "<!-- summary -->" in text else ""
    return re.sub(r"<!-- summary -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main(files):
    if files:
        print(table(files))
    else:
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
            page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
