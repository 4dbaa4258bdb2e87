"""Six numbered questions on one pool of words, all answered yes or no; the dial makes them disagree.

    question  asks (its text does not say so)                    yes                 no
    1, 4      whether a word is pleasant                         positive            negative
    2, 5      whether it is about something to trust             trust               fear, anger, disgust
    3, 6      whether it is sad rather than angry                sadness             anger

    text      Question 4: abandon

Questions 4 to 6 repeat 1 to 3.  At conflict c, a share c of them swaps yes and no: at 0 the two halves ask
the same; at 1 each question has a twin with the opposite answers on the same words.  Everything else is
the same at all points of the dial: texts, words, batches and initial values.

Words are split by root (see examples/common/tasks.py): a fifth is held out, a fifth for validation.
"""

import json

import torch

from examples.common.tasks import digest, package_file, root_of

CONCEPTS = (  # tags that mean yes, tags that mean no
    ({"positive"}, {"negative"}),
    ({"trust"}, {"fear", "anger", "disgust"}),
    ({"sadness"}, {"anger"}),
)
QUESTIONS = 2 * len(CONCEPTS)
DIAL = (0, 1, 2, 3)  # swapped questions; c = this / 3
SWAPPED_FIRST = (3, 4, 5)  # in this order
ANSWERS = ("no", "yes")
SPLITS = {"train": (2, 3, 4), "validation": (1,), "test": (0,)}  # fifths of the roots


def load(split, most):
    """[(question, text, answer)] at c = 0, with up to `most` words per concept, half yes, half no."""
    lexicon = json.loads(package_file("nrclex", "nrc_en.json").read_text("utf-8"))
    roots, fifths = root_of(lexicon), SPLITS[split]
    words = sorted((w for w in lexicon if digest(roots[w]) % 5 in fifths), key=digest)
    items = []
    for number, (yes, no) in enumerate(CONCEPTS):
        tagged = [(w, not yes.isdisjoint(lexicon[w]), not no.isdisjoint(lexicon[w])) for w in words]
        sides = [
            [w for w, y, n in tagged if (y, n) == side] for side in ((False, True), (True, False))
        ]
        count = min(most // 2, *map(len, sides))
        for answer, side in zip(ANSWERS, sides):
            items += [
                (question, f"Question {question + 1}: {word}", answer)
                for question in (number, number + len(CONCEPTS))
                for word in side[:count]
            ]
    return items


def swap(wanted, tasks, swapped):
    """Answers (n,) of the items after `swapped` questions of the second half swap yes and no."""
    turned = torch.isin(tasks, torch.tensor(SWAPPED_FIRST[:swapped], dtype=torch.long))
    return torch.where(turned, 1 - wanted, wanted)
