"""What is printed about a data set: its structure, omissions, split and changes."""

from bdh_lib.data.chats import ROLES_BY_FIELD
from bdh_lib.data.columns import ALIASES
from bdh_lib.data.formats import REQUIRED_FIELDS, needed_fields

FEW_BYTES = 1000  # of a given validation, below which its loss is mostly chance


def skip_lines(report: dict) -> list[str]:
    """Say what is not trained on, and why: records, turns, columns, and files or splits.

    A line of a .jsonl file is a record.
    """
    first = report.get("first_skipped", {})
    lines = [
        f"skipped {n:,}: {reason}" + (f" (first: record {first[reason]:,})" if first else "")
        for reason, n in report["skipped"].items()
    ]
    lines += [f"left out {n:,}: {reason}" for reason, n in report.get("left_out", {}).items()]
    if unused := report.get("unused"):
        total = report["bytes_read"]
        shares = [f"{name} {column['bytes'] / total:.1%}" for name, column in unused.items()]
        lines.append(f"columns not used, with their share of all bytes: {', '.join(shares)}")
    return lines + [f"not read: {what}" for what in report.get("not_read", [])]


def _other_columns(report: dict) -> list[str]:
    """Say which unused columns may hold a field that others were taken for, and how to choose."""
    read = {name.strip().lower() for names in report["structures"] for name in names.split("/")}
    lines = []
    for name in report.get("unused", {}):
        fields = [f for f in ("context", *ROLES_BY_FIELD) if name.strip().lower() in ALIASES[f]]
        for field in [f for f in fields if read.intersection(ALIASES[f])][:1]:
            lines.append(
                f"column {name} may be the {field}, too: --columns {field}={name} takes it"
            )
    return lines


def cannot_serve(report: dict) -> str:
    """Say why a data set has no text in a mode, and the ways on."""
    mode, fields = report["mode"], report["fields"]
    unused = [name for name in report["unused"] if "[]." not in name]  # keys of turns aside
    if not report["records"]:
        return f"DATASET {report['dataset']} is empty: it has no record"
    lacking = [f for f in needed_fields(mode) if f not in fields]
    works = [m for m in REQUIRED_FIELDS if set(needed_fields(m)) <= set(fields)]
    line = (
        f"DATASET {report['dataset']} has no record for TRAINING_MODE {mode!r}, which needs "
        f"{', '.join(needed_fields(mode))}: lacking "
        f"{', '.join(lacking) or 'them together in one record'}. "
        f"Structure: {', '.join(report['structures']) or 'no records'}; "
        f"{'; '.join(skip_lines(report)[:3]) or 'nothing skipped'}. "
    )
    if unused:
        pairs = ",".join(f"{field}=COLUMN" for field in lacking or needed_fields(mode))
        if mode == "full" and "system" not in fields:
            pairs += ", with system=COLUMN if there is one"
        line += f"Where one of the columns {', '.join(unused)} holds it: --columns {pairs}"
        line += ". " if fields else ", or messages=COLUMN for turns, text=COLUMN for plain text. "
        if not fields and any(kind in report["dataset"].lower() for kind in (".csv", ".tsv")):
            line += "If its first line is a record, put the names of the columns before it. "
    return f"{line}Modes that would work: {', '.join(works) or 'none'}"


def data_changes(saved: dict, current: dict) -> dict[str, str]:
    """Say how the bytes of two reports differ, under "train data" and "val data", where they do."""
    changes = {}
    for side in ("train", "val"):
        if saved[side]["sha256"] != current[side]["sha256"]:
            old, new = (
                f"{count_text(of[side]['records'])}{of[side]['bytes']:,} bytes, {dataset_label(of)}"
                for of in (saved, current)
            )
            change = f"there {old}, here {new}" if old != new else f"other bytes, as many: {old}"
            changes[f"{side} data"] = f"{side} data: {change}"
    return changes


def dataset_label(report: dict) -> str:
    """Return the data set of a report, with its commit where it is on the hub."""
    commit = report.get("commit")
    return report["dataset"] + (f" (commit {commit})" if commit else "")


def count_text(records: int | None) -> str:
    """Return "12 records, " to stand before other numbers; "" for a ready split, which has none."""
    return "" if records is None else f"{records:,} records, "


def describe(report: dict) -> str:
    """Return the report of `prepare` for people: structure, fields, what is left out, the split."""
    lines = [f"data: {dataset_label(report)}, {count_text(report['records'])}mode {report['mode']}"]
    for structure, n in report["structures"].items():
        share = "" if n is None else f": {n / report['records']:.1%} of records"
        lines.append(f"  structure {structure}{share}")
    n_texts = report.get("texts", report["records"])  # a ready split has none
    lines += [_field_line(name, field, report) for name, field in report["fields"].items()]
    if several := report.get("several_turns"):
        lines.append(f"  chats of several turns: {several:,}, each a record of its own")
    if n_texts and n_texts > report["records"] - sum(report["skipped"].values()):
        lines.append(f"  {n_texts:,} texts of this mode in them, each a record from here on")
    if without := report.get("without_system"):
        which = "no record has" if without == n_texts else f"{without:,} of {n_texts:,} have no"
        article = " a" if without == n_texts else ""
        lines.append(f"  {which}{article} system text: full is trained without its section there")
    lines += [f"  {line}" for line in skip_lines(report) + _other_columns(report)]
    if report["shared"]:
        lines.append(f"  left out of validation {report['shared']:,}: text also in training")
    for side, name in (("train", "training"), ("val", "validation")):
        given = ", as given" if report.get("given_validation") and side == "val" else ""
        size = f"{count_text(report[side]['records'])}{report[side]['bytes']:,} bytes"
        lines.append(f"  {name}{given}: {size}")
    if report.get("given_validation") and report["val"]["bytes"] < FEW_BYTES:
        lines.append("  so few bytes say little of the loss; without that file VAL_FRACTION of the "
                     "records is held out")  # fmt: skip
    return "\n".join(lines)


def _field_line(name: str, field: dict, report: dict) -> str:
    """Say how many records have a field, how long it is, and whether the mode trains on it."""
    trained = name in ("text", *REQUIRED_FIELDS[report["mode"]])
    return (
        f"  field {name}: in {field['records'] / report['records']:.1%} of records, mean length "
        f"{field['mean_length']:,.0f} characters{'' if trained else ', not part of this mode'}"
    )
