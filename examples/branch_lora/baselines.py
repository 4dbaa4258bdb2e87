"""Sequential LoRA with a loss against forgetting: EWC and LwF, the paper's baselines.

    EWC   L + strength / 2 * sum_p F_p (p - p*)^2     F_p = sum over tasks of  E (d log p(a | x) / dp)^2

p* is the parameter after the previous task, x a training item of a task, and a an answer sampled from the
model after that task: F is the diagonal of the Fisher information.  A single p* for all tasks, with their
F summed, is the correction by Huszar.

    LwF   L - strength * sum_a  q_a log softmax(z / 2)_a          q = softmax(z* / 2)

z are the scores of the new task's items, z* those of the model before it, over the answers seen so far.

Sources: Kirkpatrick et al. 2017 (EWC), arXiv 1612.00796; Huszar 2018, arXiv 1712.03847; Li and Hoiem
2016 (LwF), arXiv 1606.09282.
"""

import torch
from torch.nn.functional import cross_entropy

from examples.branch_lora.learners import Learner

SOFTENED = 2.0  # LwF's temperature


class Ewc(Learner):
    def __init__(self, model, targets, strength):
        super().__init__(model, targets)
        self.strength = strength
        self.learned = [p for p in model.parameters() if p.requires_grad]
        self.fisher = [torch.zeros_like(p) for p in self.learned]
        self.anchor = None  # parameters after the previous task

    def loss(self, number, batch):
        return super().loss(number, batch) + self.strength / 2 * self.penalty()

    def penalty(self):
        if self.anchor is None:
            return 0.0
        terms = zip(self.fisher, self.learned, self.anchor)
        return sum((f * (p - was).square()).sum() for f, p, was in terms)

    def end(self, batches):
        super().end(batches)
        self.anchor = [p.detach().clone() for p in self.learned]
        for batch in batches:
            self._observe(batch, share=1 / len(batches))

    def _observe(self, batch, share):
        """Adds a share of a batch's mean squared gradient to the Fisher information.

        With answers sampled from the model, gradients have mean zero.  The squared mean over the batch,
        times the number of items, is then an unbiased estimate of the mean of the squares.
        """
        scores = self.scores(batch)
        answers = torch.multinomial(scores.detach().softmax(1), 1).squeeze(1)
        gradients = torch.autograd.grad(cross_entropy(scores, answers), self.learned)
        for fisher, gradient in zip(self.fisher, gradients):
            fisher += share * len(answers) * gradient.square()


class Lwf(Learner):
    def __init__(self, model, targets, strength):
        super().__init__(model, targets)
        self.strength, self.seen, self.before = strength, [], []

    @torch.no_grad()
    def begin(self, batches):
        self.before = [self._softened(self.scores(batch)) for batch in batches if self.seen]
        super().begin(batches)  # records the old model's outputs without dropout

    def loss(self, number, batch):
        scores = self.scores(batch)
        loss = cross_entropy(scores, batch.wanted)
        if not self.before:
            return loss
        said = self._softened(scores).log()
        return loss - self.strength * (self.before[number] * said).sum(1).mean()

    def end(self, batches):
        super().end(batches)
        found = torch.cat([batch.wanted for batch in batches]).tolist()
        self.seen = sorted({*self.seen, *found})

    def _softened(self, scores):
        """Probabilities at temperature SOFTENED, (B, answers seen so far)."""
        return (scores[:, self.seen] / SOFTENED).softmax(1)
