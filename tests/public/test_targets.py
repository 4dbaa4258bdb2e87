"""Which modules a configuration selects: patterns, "all-linear", and messages about the others."""

from __future__ import annotations

import logging
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, LoraMoeLinear, inject, injected
from lora_moe.targets import targets_of

from ..support.injected import Model, config

LANGUAGE = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
VISION = ["vision.0.q_proj", "vision.0.v_proj"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture(autouse=True)
def silence():
    """Turns every warning that a test does not expect into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- patterns ------------------------------------------------------------------------------------

PATTERNS = {
    "suffixes": (config("q_proj", "v_proj"), [*LANGUAGE, *VISION]),
    "a-set": (LoraMoeConfig(target_modules={"q_proj", "v_proj"}), [*LANGUAGE, *VISION]),
    "a-list": (
        LoraMoeConfig(
            target_modules=["all-linear"],
            exclude_modules=["vision.0.q_proj", "vision.0.v_proj", "shared", "head"],
        ),
        LANGUAGE,
    ),
    "numpy-names": (
        LoraMoeConfig(target_modules=np.array(["q_proj", "v_proj"])),
        [*LANGUAGE, *VISION],
    ),
    "numpy-strings": (
        config(np.str_("1.q_proj"), exclude_modules={np.str_("shared")}),
        ["layers.1.q_proj"],
    ),
    "numpy-pattern": (LoraMoeConfig(target_modules=np.str_(r"layers\.\d\.[qv]_proj")), LANGUAGE),
    "longer-suffix": (config("1.q_proj"), ["layers.1.q_proj"]),
    "excluded": (config("q_proj", "v_proj", exclude_modules=r"vision\..*"), LANGUAGE),
    "excluded-suffix": (config("q_proj", exclude_modules=["0.q_proj"]), ["layers.1.q_proj"]),
    "regex": (config(r"^layers\.\d\.[qv]_proj"), LANGUAGE),
    "whole-name": (config("head"), ["head"]),
    "all-linear": (config("all-linear"), [*LANGUAGE, *VISION, "shared", "head"]),
    "all-linear-string": (
        LoraMoeConfig(target_modules="All-Linear"),
        [*LANGUAGE, *VISION, "shared", "head"],
    ),
    "all-linear-excluded": (
        config("all-linear", exclude_modules=("q_proj", "alias", "vision.0.v_proj")),
        [*LANGUAGE[1::2], "head"],
    ),
}


@pytest.mark.parametrize("config, expected", PATTERNS.values(), ids=PATTERNS)
def test_patterns(model, config, expected):
    before = dict(model.named_modules(remove_duplicate=False))
    assert inject(model, config) is model
    assert sorted(injected(model)) == sorted(expected)
    for name, layer in injected(model).items():
        assert layer.base_layer is before[name]
    after = dict(model.named_modules(remove_duplicate=False))
    untouched = [n for n in before if not isinstance(after[n], LoraMoeLinear)]
    assert all(after[n] is before[n] for n in untouched)


@pytest.mark.parametrize("pattern", ["^q_proj", r"^layers\.0\.q"], ids=["end", "start"])
def test_a_regular_expression_must_match_the_whole_path(model, pattern):
    with pytest.raises(ValueError, match="nothing matches"):
        inject(model, config(pattern))


def test_all_linear_selects_modules_without_experts(model):
    inject(model, config("q_proj"))
    first = injected(model)
    inject(model, config("all-linear"))
    assert injected(model).keys() == {*LANGUAGE, *VISION, "shared", "head"}
    assert all(injected(model)[path] is layer for path, layer in first.items())
    with pytest.raises(ValueError, match="nothing matches"):
        inject(model, config("all-linear"))


class Reader(nn.Module):
    """Calls one child, reads the weight of another, and does both with the third."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.called(x) @ self.read.weight
        return x @ self.both.weight if self.training else self.both(x)


def test_all_linear_logs_once_what_it_leaves_out(caplog):
    blocks = nn.ModuleList([Reader(), Reader()])
    with caplog.at_level(logging.INFO, logger="lora_moe.all_linear"):
        inject(blocks, config("all-linear"))
    assert list(injected(blocks)) == ["0.called", "1.called"]
    (record,) = (r for r in caplog.records if r.name == "lora_moe.all_linear")
    assert record.getMessage() == (
        '"all-linear" leaves out *.read (Reader reads its weight without calling it);'
        " *.both (Reader reads its weight in one of its branches)"
    )


def test_a_name_is_refused_where_experts_never_run_and_warned_of_where_they_may_not():
    with pytest.raises(ValueError, match=r"0\.read \(Reader reads its weight without calling it\)"):
        inject(nn.ModuleList([Reader()]), config("called", "read"))
    with pytest.warns(UserWarning, match=r"in some branches: \*\.both \(in Reader\)"):
        blocks = inject(nn.ModuleList([Reader()]), config("both"))
    assert list(injected(blocks)) == ["0.both"]


# --- names that match nothing --------------------------------------------------------------------


def only_warning(record):
    (warning,) = record
    assert warning.category is UserWarning and warning.filename == __file__
    return str(warning.message)


def test_names_that_match_nothing_give_one_warning(model):
    fields = {"exclude_modules": ("visoin",)}
    with pytest.warns(UserWarning) as record:
        inject(model, config("q_proj", "v_porj", "0.q_porj", "zzzz", **fields))
    assert only_warning(record) == (
        "no module matches target_modules: 'v_porj' (did you mean 'v_proj', 'q_proj'?);"
        " target_modules: '0.q_porj' (did you mean '0.q_proj', '1.q_proj', '0.v_proj'?);"
        " target_modules: 'zzzz'; exclude_modules: 'visoin' (did you mean 'vision'?)"
    )
    assert len(injected(model)) == 3


def test_an_exclude_pattern_that_matches_nothing_warns(model):
    with pytest.warns(UserWarning, match=r"exclude_modules: 'visoin\\\\\.\.\*'") as record:
        inject(model, config("all-linear", exclude_modules=r"visoin\..*"))
    only_warning(record)


def test_names_of_excluded_modules_are_not_unmatched(model):
    inject(model, config("q_proj", "shared", exclude_modules=("shared",)))


NOTHING = {
    "name-as-pattern": ("q_proj", r"did you mean ('q_proj',)?"),
    "typing-error-as-pattern": ("q_porj", r"did you mean ('q_proj',)?"),
    "alternatives": ("(q|v)_proj", r"did you mean '.*\\.((q|v)_proj)'?"),
    "part-of-a-path": (r"q_pro", "linear modules here, 9 in all: layers.0.q_proj"),
    "part-of-a-name": (("proj",), "did you mean 'v_proj', 'q_proj'?"),
    "typing-error": (("q_porj",), "did you mean 'q_proj', 'v_proj'?"),
    "empty": ((), "nothing matches ()"),
}


@pytest.mark.parametrize("target, hint", NOTHING.values(), ids=NOTHING)
def test_what_matches_nothing_is_refused_with_a_hint(target, hint):
    with pytest.raises(ValueError, match=re.escape(hint)):
        inject(model := Model(), LoraMoeConfig(target_modules=target))
    assert not injected(model)


# --- refused, leaving the model as it was --------------------------------------------------------


def fused():
    """A PyTorch layer with fused kernels that read its children's weights and bypass any wrapper."""
    return nn.ModuleDict({"block": nn.TransformerEncoderLayer(8, 2, 16), "fc": nn.Linear(8, 8)})


REFUSED = {
    "nothing": (Model, config("w_q"), r"layers\.0\.q_proj"),
    "no-pattern": (Model, config(), "nothing matches"),
    "all-excluded": (Model, config("q_proj", exclude_modules=("q_proj",)), "nothing matches"),
    "norm": (Model, config("q_proj", "norm"), r"layers\.0\.norm \(a LayerNorm is not linear\)"),
    "embedding": (Model, config("embed"), "Embedding"),
    "container": (Model, config("layers"), "ModuleList"),
    "attention": (fused, config("out_proj"), "MultiheadAttention reads its weight"),
    "encoder": (fused, config("fc", "linear1"), "TransformerEncoderLayer reads its weight"),
    "the-model-itself": (lambda: nn.Linear(4, 4), config(r"^.*"), "nothing matches"),
    "all-linear-itself": (lambda: nn.Linear(4, 4), config("all-linear"), "nothing matches"),
}


@pytest.mark.parametrize("build, config, message", REFUSED.values(), ids=REFUSED)
def test_refused_targets(build, config, message):
    model = build()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert list(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


# --- heads of models from transformers -----------------------------------------------------------

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = {
    "causal": ("Llama", "ForCausalLM", {"lm_head"}),
    "sequence": ("Llama", "ForSequenceClassification", {"score"}),
    "tokens": ("Bert", "ForTokenClassification", {"classifier"}),
    "answers": ("Qwen2", "ForQuestionAnswering", {"qa_outputs"}),
    "nested": ("Roberta", "ForSequenceClassification", {"classifier.dense", "classifier.out_proj"}),
    "choice": ("Bert", "ForMultipleChoice", {"classifier"}),
    "masked": ("Bert", "ForMaskedLM", {"cls.predictions.decoder"}),
    "no-head": ("Llama", "Model", set()),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["itself", "wrapped"])
@pytest.mark.parametrize("family, task, heads", HEADS.values(), ids=HEADS)
def test_all_linear_leaves_heads_alone(family, task, heads, wrap):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, family + task)(getattr(transformers, f"{family}Config")(**SIZES))
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    module = nn.ModuleDict({"inner": model}) if wrap else model
    found = targets_of(module, LoraMoeConfig(target_modules="all-linear"))
    assert {path.removeprefix("inner.") for path in found} == linear - heads
    assert heads <= linear


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern", ["(", "[", "(" * 2000 + ")" * 2000], ids=["open", "set", "deep"]
)
def test_an_invalid_regular_expression_is_named(field, pattern):
    """In inject, not in the configuration: a configuration from a file must be cheap to read."""
    config = LoraMoeConfig(**{"target_modules": ("q",), field: pattern})
    with pytest.raises(ValueError, match=f"{field}: expected a regular expression"):
        inject(nn.ModuleDict({"q": nn.Linear(4, 4)}), config)
