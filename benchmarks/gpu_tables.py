"""The lines of benchmarks/gpu.py and of gpu_compile.py --json as tables: measured beside estimated."""

import json

Row = list[object]


def render(text: str) -> str:
    """All tables for which there are lines, in Markdown."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    parts = ("card", "kernel", "inner", "attention", "model", "timm", "knobs", "digits")
    of = {part: [line for line in lines if line.get("part", "").split()[:1] == [part]] for part in parts}
    parts = [_card(line) for line in of["card"]]
    parts += [
        _table("Relative errors (root mean square) against float32", of["kernel"],
               ("model", "formulation", "launched_by", "right", "over_plain", "forward", "gradients"), "{:.1e}"),
        _table("The inner layer alone, µs: of the images, and of a call without any", of["inner"],
               ("formulation", "launched_by", "forward_us", "gradient_us", "forward_call_us", "gradient_call_us",
                "floor_us"), "{:.0f}"),
        _table("Attention between sentences, µs", of["attention"],
               ("implementation", "padded_to", "same_bits", "forward_us", "forward_and_gradient_us"), "{:.0f}"),
        _models(of["model"] + of["timm"], [line for line in lines if line.get("estimate")]),
        _table("Warps of a block and blocks of a multiprocessor, µs", of["knobs"],
               ("warps", "blocks", "forward_us", "forward_and_gradient_us"), "{:.0f}"),
        _table("An epoch of digits", of["digits"], ("formulation", "loss", "ema_top1"), "{:.4f}"),
    ]  # fmt: skip
    failed = [f"- {line['part']}: {line['failed']}" for line in lines if "failed" in line]
    parts += ["What failed:\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(filter(None, parts))


def _card(line: dict) -> str:
    there = "measured" if line["platform"] == "gpu" else "no GPU: these numbers mean nothing"
    return f"{line['device']}, JAX {line['jax']}, {line['images']} images in bfloat16; {there}."


def _table(title: str, lines: list[dict], columns: tuple[str, ...], form: str) -> str:
    rows = [[_cell(line.get(column), form) for column in columns] for line in lines if "not_run" not in line]
    rows += [
        [line.get(columns[0], ""), line["not_run"], *[""] * (len(columns) - 2)] for line in lines if "not_run" in line
    ]
    return _markdown(title, [column.replace("_", " ") for column in columns], rows) if rows else ""


def _models(lines: list[dict], estimates: list[dict]) -> str:
    """Milliseconds of each model, over the stock ViT-S, and both by estimate."""
    measured = {(line["which"], line["model"]): line["ms"] for line in lines if "ms" in line}
    estimated = {(line["which"], line["model"]): (line["least us"] / 1e3, line["most us"] / 1e3) for line in estimates}
    rows = []
    for which, model in dict.fromkeys([*measured, *estimated]):
        spent, guess = measured.get((which, model)), estimated.get((which, model))
        over, guess_over = measured.get((which, "stock")), estimated.get((which, "stock"))
        rows.append([
            which, model, _cell(spent, "{:.2f}"), _cell(spent and over and spent / over, "{:.2f}"),
            f"{guess[0]:.2f} to {guess[1]:.2f}" if guess else "-",
            f"{guess[0] / guess_over[0]:.2f} to {guess[1] / guess_over[1]:.2f}" if guess and guess_over else "-",
            _cell(spent and guess and spent / guess[0], "{:.2f}"),
        ])  # fmt: skip
    head = ["", "model", "ms", "over stock ViT-S", "estimated ms", "estimated over stock", "measured over estimated"]
    return _markdown("Whole models", head, rows) if rows else ""


def _cell(value: object, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value) if isinstance(value, float) else str(value)


def _markdown(title: str, head: list[str], rows: list[Row]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return f"{title}\n\n" + "\n".join(lines)
