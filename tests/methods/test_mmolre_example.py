"""The program of the docs runs as printed; the evidence in quick mode; its statistics."""

import copy
import re
from pathlib import Path

import pytest
import torch

DOC = Path(__file__).parents[2] / "docs/mmolre.md"


def test_program_of_the_documentation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE)
    assert len(block.splitlines()) < 30
    g = torch.Generator().manual_seed(0)
    features = {
        "text": torch.randn(6, 9, 768, generator=g),
        "audio": torch.randn(6, 4, 74, generator=g),
    }
    masks = {"text": torch.arange(9) < torch.tensor([9, 1, 3, 9, 5, 2])[:, None]}
    labels = {"sentiment": torch.randn(6, generator=g), "emotion": torch.arange(6)}
    exec(block, {"batches": [(features, masks, labels)] * 12})
    printed = capsys.readouterr().out
    assert "'mae': 0." in printed and "'accuracy': 1.0" in printed  # six items, memorized


def test_links_of_the_documentation():
    for target in re.findall(r"\]\(([^)#]+)\)", DOC.read_text()):
        assert target.startswith("https://") or (DOC.parent / target).exists(), target


@pytest.mark.usefixtures("mmolre_packages")
def test_evidence_in_quick_mode(tmp_path, capsys):
    from examples.mmolre import experiment as mmolre

    mmolre.main(["--quick", "--seeds", "0", "1", "--out", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert all(f"| {arm} |" in text for arm in mmolre.ARMS)
    assert (tmp_path / "gains.png").stat().st_size > 5000
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(mmolre.ARMS)  # the first line is the setting
    again = ["--quick", "--seeds", "1", "--arms", "text alone", "hard sharing"]
    mmolre.main([*again, "--out", str(tmp_path)])  # nothing is trained again
    assert "| MMoLRE |" not in (tmp_path / "results.md").read_text().split("\n\n", 3)[3]
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


@pytest.mark.usefixtures("mmolre_packages")
def test_timing_in_quick_mode(capsys):
    from examples.mmolre import experiment as mmolre

    mmolre.main(["--quick", "--times"])
    assert "| full-rank, plain PyTorch | " in capsys.readouterr().out


@pytest.mark.usefixtures("mmolre_packages")
def test_arms_have_equal_sizes():
    from examples.mmolre.arms import ARMS, TASKS, build, parameters

    def size(name):
        return sum(parameters(build(c, ARMS[name].one_fusion)) for c in ARMS[name].models)

    for name in ("hard sharing", "one model per task, equal size"):
        assert abs(size(name) / size("MMoLRE") - 1) < 0.01
    for name in ("no task experts", "no task experts, one router"):
        assert abs(size(name) / size("MMoLRE") - 1) < 0.025
    for arm in ARMS.values():
        assert [name for config in arm.models for name in config.tasks] == list(TASKS)


@pytest.mark.usefixtures("mmolre_packages")
def test_hard_sharing_has_one_vector_for_all_tasks(parts):
    from examples.mmolre import data
    from examples.mmolre.arms import ARMS, build
    from examples.mmolre.losses import forward

    (arm,) = ARMS["hard sharing"].models
    model, seen = build(arm, one_fusion=True), []
    for head in model.heads.values():
        head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    forward(model, data.held_out(*parts, "test", 10))
    assert len(seen) == 4 and all(torch.equal(vector, seen[0]) for vector in seen)


@pytest.mark.usefixtures("mmolre_packages")
def test_gradients_of_tasks_are_compared_on_shared_parameters():
    from examples.mmolre.comparisons import HARD, Conflict

    g = torch.tensor([[1.0, 0], [1, 1], [-2, 0], [0, 3]], dtype=torch.double)
    conflict = Conflict({(HARD, 0): {"gradients": [(g @ g.T).tolist()]}}, [0])
    for t in range(4):
        rest = g.sum(0) - g[t]
        cosine = torch.cosine_similarity(g[t], rest, 0)
        assert conflict.with_rest[0, 0, t] == pytest.approx(float(cosine))
        norms = g.norm(dim=1)
        ratio = norms[t] / ((norms.sum() - norms[t]) / 3)
        assert conflict.ratio[0, 0, t] == pytest.approx(float(ratio))
    assert conflict.pairs[0, 0, 0].tolist() == pytest.approx([1, 0.5**0.5, -1, 0])


@pytest.mark.usefixtures("mmolre_packages")
@pytest.mark.parametrize("streams", [1, 2])
def test_plain_block_equals_ours(streams):
    from examples.mmolre.plain import PlainUniTSE, plain
    from lora_moe.methods.mmolre import UniTSE

    torch.manual_seed(0)
    block = UniTSE(12, (3, 3), (2, 5), residual=streams == 2).double()
    with torch.no_grad():
        block.bias_A.normal_(), block.bias_B.normal_()
    same, found = plain(copy.deepcopy(block)), []
    assert type(same) is PlainUniTSE
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    values = torch.randn(2, 6, 12) if streams == 1 else torch.randn(2, 2, 6, 12)
    for each in (block, same):
        x = values.double().requires_grad_()
        y = each(x, mask)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in each.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("mmolre_packages")
def test_gains_are_means_over_labeled_items():
    import numpy as np

    from examples.mmolre.arms import TASKS
    from examples.mmolre.comparisons import gains

    draw = np.random.default_rng(0)
    base = draw.random((len(TASKS), 300))
    base[2, 30:] = np.nan  # a tenth has labels
    saved = dict(zip(TASKS, (0.0, 0.2, -0.2, 0.4)))

    def run(share):
        noise = 0.01 * draw.normal(size=base.shape)
        losses = base - share * np.array([*saved.values()])[:, None] + share * noise
        return {"tasks": {task: {"losses": of.tolist()} for task, of in zip(TASKS, losses)}}

    found = {(arm, seed): run(share) for arm, share in (("a", 1), ("b", 0)) for seed in (0, 1)}
    intervals = gains(found, "a", "b", (0, 1))
    for task, by in (saved | {"mean": 0.1}).items():
        mean, low, high = intervals[task]
        assert mean == pytest.approx(by, abs=0.01) and low <= mean <= high < low + 0.05
    assert set(gains(found, "b", "b", (0, 1)).values()) == {(0, 0, 0)}
