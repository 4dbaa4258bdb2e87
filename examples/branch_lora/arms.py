"""The arms of BranchLoRA's example, and the settings tuned on the validation items."""

import json
import statistics
from pathlib import Path

from examples.branch_lora.baselines import Ewc, Lwf
from examples.branch_lora.data import FIRST
from examples.branch_lora.learners import BRANCHES, Branched, Learner, PerTask, Rung
from examples.common import minilm

BRANCHED = {
    "shared A": Rung("token", BRANCHES, routers=False, freeze=0),
    "sparse": Rung(routers=False, freeze=0),
    "freezing": Rung(routers=False),
    "BranchLoRA": Rung(),
    "no freezing": Rung(freeze=0),
    "trunk held": Rung(trunk_held=True),
    "growing": Rung(grows=True),
}
MAIN = ("lora", "EWC", "LwF", "LoRA per task", "moelora", "BranchLoRA")  # plus "joint"
LADDER = ("lora", "moelora", "shared A", "sparse", "freezing", "BranchLoRA")
ABLATIONS = ("no freezing", "trunk held", "growing")
IN_A_ROW = tuple(dict.fromkeys([*MAIN[:-1], *LADDER, *ABLATIONS]))
ARMS = (*IN_A_ROW, "joint")  # joint training has no order
STRENGTHS = {"EWC": (1e4, 1e5, 1e6), "LwF": (0.1, 1.0, 10.0)}
GRID = (1e-4, 3e-4, 1e-3, 3e-3)  # learning rates, the same for every arm
RATES = Path(__file__).with_name("rates.json")  # written by --tune
OF_STRENGTH = " of strength "


def make(arm, targets, tasks, strength=None, whole=False):
    """The arm's learner, with adapters in the upper layers, or in all layers if `whole`."""
    encoder = minilm.load_model()
    model = encoder if whole else minilm.Upper(encoder, FIRST)
    if arm in BRANCHED:
        return Branched(model, targets, BRANCHED[arm])
    if arm == "LoRA per task":
        return PerTask(model, targets, tasks)
    if arm in STRENGTHS:
        return {"EWC": Ewc, "LwF": Lwf}[arm](model, targets, strength)
    return Learner(model, targets, BRANCHES if arm == "moelora" else 1)


def tuned():
    """Names of what is tuned over the grid: every arm, at each of its strengths."""
    names = [[arm + OF_STRENGTH + f"{s:g}" for s in STRENGTHS.get(arm, ())] for arm in ARMS]
    return [name for arm, of_arm in zip(ARMS, names) for name in of_arm or [arm]]


def parsed(name):
    """(arm, strength) of a name from `tuned`; strength is None if the arm has none."""
    arm, _, strength = name.partition(OF_STRENGTH)
    return arm, float(strength) if strength else None


def settings(path):
    """{arm: (best rate, best strength)}, by the mean score over the tuning seeds."""
    best = {}
    for name, of in json.loads(path.read_text())["scores"].items():
        arm, strength = parsed(name)
        for rate, scores in of.items():
            found = statistics.mean(scores), (float(rate), strength)
            best[arm] = max(best.get(arm, found), found, key=lambda pair: pair[0])
    return {arm: setting for arm, (_, setting) in best.items()}


def chosen(path):
    """The settings as a line of text."""
    names = [
        f"{arm} {rate:g}" + (f" with strength {strength:g}" if strength else "")
        for arm, (rate, strength) in settings(path).items()
    ]
    return f"Chosen: {', '.join(names)}."
