"""The demo's report in Markdown: a table, the claims, the answers, the sources."""

from examples.common.measure import median
from examples.common.tasks import SOURCES

PEAK = (
    "Peak memory is the rise of the process's resident memory during one step, with glibc told to "
    "return freed blocks at once, median of three."
)


def claims(found, learned):
    """[{text, measured, holds, decides}]; holds is None if not checked; a run fails only by decides."""
    rows = found["cost"]["contenders"]
    return [
        *_of_learning(found, learned),
        *_of_agreement(found["agreement"]),
        _of_reload(found["reload"]),
        *_of_cost(*(rows[name] for name in ("ours", "dense stacked", "loop over experts"))),
    ]


def _claim(text, measured, holds, decides=True):
    return {"text": text, "measured": measured, "holds": holds, "decides": decides}


def _of_learning(found, learned):
    """Claims about accuracy, not checked unless `learned`: the few steps of a smoke test teach nothing."""
    before, after = found["before"]["accuracy"], found["after"]["accuracy"]
    for task, untuned, tuned in zip(found["tasks"], before, after):
        majority = task["majority"]
        text = f"{task['name']}: beats the untuned model and the majority class"
        measured = f"{tuned:.1%} against {untuned:.1%} and {majority:.1%}"
        yield _claim(text, measured, tuned > max(untuned, majority) if learned else None)
    rise = 100 * (sum(after) - sum(before)) / len(after)
    text = "accuracy rises by at least 15 points on average"
    yield _claim(text, f"{rise:.1f} points", rise >= 15 if learned else None)


def _of_agreement(a):
    gradients = [error for error, _ in a["replayed"].values()]
    for text, errors, limit in (
        ("losses at the same weights, every step", a["locked"], 1e-5),
        ("gradients at the same weights and decisions", gradients, 1e-5),
        ("losses running freely, first 10 steps", a["free"][:10], 1e-3),
        (f"losses running freely, all {len(a['free'])} steps", a["free"], 1e-2),
    ):
        holds = all(error <= limit for error in errors)  # False for a NaN, which max may overlook
        yield _claim(f"ours = loop: {text}, within {limit:.0e}", f"{max(errors):.1e}", holds)


def _of_reload(reload):
    text = "adapter saved and loaded in a new process: the same logits, bit for bit"
    measured = f"{reload['logits']:,} logits, a file of {_size(reload['bytes'])}"
    return _claim(text, measured, reload["equal"])


def _of_cost(ours, dense, loop):
    """Claims that are reported but never fail a run: they depend on the machine and its other load."""
    saved = ours["saved_bytes"] / loop["saved_bytes"]
    text = "bytes saved for backward: at most 0.15 times the loop's"
    yield _claim(text, f"{saved:.3f} times", saved <= 0.15, False)
    for text, other in (
        ("a step is faster than the loop's", loop),
        ("a step is not slower than the dense stacked one", dense),
    ):
        ratio = median(other["seconds"]) / median(ours["seconds"])
        yield _claim(text, f"{ratio:.2f} times as fast", ratio >= 1, False)


def cost_panels(rows):
    """Panels for figures.draw_cost; peak memory is left out if it could not be measured."""
    columns = {
        "step time": ({n: median(row["seconds"]) for n, row in rows.items()}, _time),
        "saved for backward": ({n: row["saved_bytes"] for n, row in rows.items()}, _size),
        "peak memory": ({n: row["peak_bytes"] for n, row in rows.items()}, _size),
    }
    return [
        (t, values, text) for t, (values, text) in columns.items() if None not in values.values()
    ]


def markdown(found):
    parts = [
        "# A mixture of LoRA experts in SmolLM2-135M: the demo's report",
        _machine(found),
        _table(found),
        _notes(found),
        _claims(found["claims"]),
        _flips(found["agreement"]),
        _answers(found["before"], found["after"]),
        *(f"![{name}]({name}.png)" for name in ("accuracy", "loss", "experts", "cost")),
        _sources(),
    ]
    return "\n\n".join(parts) + "\n"


def model_card():
    return (
        "# Adapter: a mixture of LoRA experts for SmolLM2-135M-Instruct\n\n"
        "Trained by lora-moe's demo; load it with `lora_moe.load_adapter`. It was trained on the lexicon "
        "below, whose terms (research use) therefore apply to it.\n\n" + _sources() + "\n"
    )


def _machine(found):
    return (
        f"{found['machine']}; backend {found['backend']}; {len(found['loss'])} training steps of about "
        f"{found['cost']['tokens']} tokens; the whole demo took {found['seconds'] / 60:.1f} minutes."
    )


def _table(found):
    names = [task["name"] for task in found["tasks"]]
    head = ["", *names, "step time", "saved for backward", "peak memory"]
    rows = [["majority class", *_percent(task["majority"] for task in found["tasks"]), "", "", ""]]
    rows.append(["untuned model", *_percent(found["before"]["accuracy"]), "", "", ""])
    for name, row in found["cost"]["contenders"].items():
        accuracy = _percent(found["after"]["accuracy"]) if name == "ours" else [""] * len(names)
        label = "**mixture of LoRA experts, ours**" if name == "ours" else name
        cells = [_time(median(row["seconds"])), _size(row["saved_bytes"]), _size(row["peak_bytes"])]
        rows.append([label, *accuracy, *cells])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _notes(found):
    sizes = ", ".join(f"{t['name']} {t['train']} / {t['heldout']}" for t in found["tasks"])
    return (
        f"Accuracy on held-out items (training / held out: {sizes}); no held-out word shares its root with "
        "a training word of either word task or with an emoji's name. Step time: median of "
        f"{len(found['cost']['contenders']['ours']['seconds'])} interleaved rounds; a step is forward, "
        "backward and update on the same batch from the same weights. Saved for backward: unique "
        "storages, without parameters, above the "
        f"{_size(found['cost']['unadapted_saved_bytes'])} of the un-adapted model. {PEAK}"
    )


def _claims(listed):
    verdict = {True: "yes", False: "**no**", None: "not checked"}
    lines = ["| claim | measured | holds |", "|---|---|---|"]
    lines += [f"| {c['text']} | {c['measured']} | {verdict[c['holds']]} |" for c in listed]
    return "\n".join(lines)


def _flips(a):
    locked, free = a["locked_flips"], a["free_flips"]
    worst = ", ".join(f"{worst:.1e} at step {step}" for step, (_, worst) in a["replayed"].items())
    return (
        f"Routing decisions that differ between ours and the loop, of {a['decisions']:,} per step: with the "
        f"same weights {sum(locked)} in {len(locked)} steps (most in one step: {max(locked)}); running "
        f"freely {sum(free)} (first step {free[0]}, last {free[-1]}). Gradient error of the worst tensor, "
        f"with replayed decisions: {worst}."
    )


def _answers(before, after):
    lines = ["| prompt | data | untuned says | tuned says |", "|---|---|---|---|"]
    columns = after["prompts"], after["wanted"], before["answers"], after["answers"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in zip(*columns)]
    return "\n".join(lines)


def _cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def _sources():
    listed = "\n".join(f"- {source}" for source in SOURCES)
    return f"Weights and data, none of which are part of this package:\n\n{listed}"


def _percent(values):
    return [f"{value:.1%}" for value in values]


def _time(seconds):
    return f"{seconds:.2f} s"


def _size(count):
    return "not measured" if count is None else f"{count / 2**20:,.0f} MiB"
